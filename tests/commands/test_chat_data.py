"""Rows, templates and settings of chat: what is found, cut, left out and refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers

USER, SAYS = {"role": "user", "content": "so"}, {"role": "assistant", "content": "it"}
TURNS = {"messages": [USER, SAYS]}


@pytest.fixture
def train(run_cli: Any, chat_base: Path, tmp_path: Path) -> Callable[..., Any]:
    """Function: train one step on some rows, which are written into rows.jsonl."""

    def run(rows: list[dict[str, Any]], *more: str) -> Any:
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "rows.jsonl").write_text(text, encoding="utf-8")
        given = {setting.partition("=")[0] for setting in more}
        usual = ("task.max_length=64", "task.data.validation_split=0.2", f"model.path={chat_base}")
        kept = [setting for setting in usual if setting.partition("=")[0] not in given]
        steps = ("trainer.max_steps=1", "trainer.global_batch_size=8", "run.dir=b", "seed=1")
        settings = ("task=chat", "task.data.path=rows.jsonl", *kept, *steps, *more)
        return run_cli("train", *settings, cwd=tmp_path)

    return run


LAYOUTS: dict[str, dict[str, Any]] = {
    "alpaca": {"instruction": "what colour is", "input": "snow", "output": "it is white"},
    "prompt": {"prompt": "what colour is snow", "completion": "it is white"},
    "sharegpt": {
        "conversations": [
            {"from": "human", "value": "what colour is snow"},
            {"from": "gpt", "value": "it is white"},
        ],
        "system": "so",
    },
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_is_found(train: Any, name: str) -> None:
    done = train([{**LAYOUTS[name], "other": n} for n in range(20)])
    assert done.code == 0, done.err
    assert "column other" not in done.err
    counts = [line.split() for line in done.err.splitlines() if line.split()[:2] == ["train", "16"]]
    # it, is, white and the end of the turn
    assert [line[-1] for line in counts] == ["4.0"]


OVERLONG = {
    "truncate": (0, "task.max_length cut 1 of 20 rows"),
    "drop": (0, "left out 1 of 20 rows, longer than task.max_length"),
    "error": (2, "error[task.overlong]"),
    "prompt": (2, "must be enough for each prompt"),
}


@pytest.mark.parametrize("name", OVERLONG)
def test_overlong_rows(train: Any, tmp_path: Path, name: str) -> None:
    code, said = OVERLONG[name]
    long = [
        {"role": "user", "content": "what " * (40 if name == "prompt" else 8)},
        {"role": "assistant", "content": "it is red " * 10},
    ]
    rows = [{"messages": [{"role": "user", "content": "so " * (n % 9 + 1)}, SAYS]}
            for n in range(24)]  # fmt: skip
    overlong = f"task.overlong={'truncate' if name == 'prompt' else name}"
    done = train([*rows[:7], {"messages": long}, *rows[7:]], overlong, "task.max_length=32")
    assert done.code == code, done.err
    assert said in done.err
    if code:
        assert "rows.jsonl row 8" in done.err
        assert not (tmp_path / "b").exists()


BAD: dict[str, tuple[Any, str]] = {
    "empty answer": ([USER, {"role": "assistant", "content": "  "}], "data.empty-answer"),
    "unknown role": ([USER, {"role": "robot", "content": "it"}], "data.unknown-role"),
    "no assistant": ([USER, USER], "data.no-assistant"),
    "no list": ("so", "data.bad-messages"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_rows_are_named(train: Any, tmp_path: Path, name: str) -> None:
    value, problem = BAD[name]
    done = train([*[TURNS] * 4, {"messages": value}, *[TURNS] * 15])
    assert done.code == 2
    assert f"error[{problem}]" in done.err
    assert "rows.jsonl row 5" in done.err
    assert not (tmp_path / "b").exists()


def test_what_a_template_refuses_is_named(train: Any, tmp_path: Path) -> None:
    strict = "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}"
    strict += "{% endif %}{{ m.role + ' ' + m.content + '</s>' }}{% endfor %}"
    (tmp_path / "own.jinja").write_text(strict)
    tool = {"messages": [USER, {"role": "tool", "content": "so"}, SAYS]}
    done = train([tool] * 20, "task.chat_template=own.jinja")
    assert done.code == 2
    assert "error[chat.refused]" in done.err
    assert "no tools" in done.err
    assert "rows.jsonl row" in done.err


def test_a_model_without_a_template_needs_one(
    train: Any, run_cli: Any, tmp_path: Path, chat_base: Path
) -> None:
    base, rows = tmp_path / "base", [TURNS] * 20
    shutil.copytree(chat_base, base, ignore=shutil.ignore_patterns("*.jinja"))
    done = train(rows, f"model.path={base}")
    assert done.code == 2
    assert "error[chat.no-template]" in done.err
    assert "task.chat_template=chatml" in done.err
    own = (chat_base / "chat_template.jinja").read_text(encoding="utf-8")
    (tmp_path / "own.jinja").write_text(own)
    done = train(rows, f"model.path={base}", "task.chat_template=own.jinja")
    assert done.code == 0, done.err
    # What was trained with counts.
    (tmp_path / "own.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    done = run_cli("merge", tmp_path / "b", "output=m", cwd=tmp_path)
    assert done.code == 0, done.err
    merged = transformers.AutoTokenizer.from_pretrained(tmp_path / "m")
    assert merged.chat_template == own


def test_a_metric_of_answers_needs_answers(train: Any) -> None:
    done = train([TURNS] * 20, "task.metric=bleu")
    assert done.code == 2
    assert "error[task.metric-needs-answers]" in done.err

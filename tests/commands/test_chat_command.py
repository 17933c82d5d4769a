"""`lora-cli chat`: what it answers is what predict answers to the same conversation."""

import builtins
import io
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

QUESTIONS = ("the film was good", "and the music", "no one was in the city")


class Terminal(io.TextIOWrapper):
    def isatty(self) -> bool:
        return True


@pytest.fixture(scope="module")
def chat_run(
    run_cli: Any, tiny_language_dir: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run that has hardly learned anything: what it says is strange, and always the same."""
    cwd = tmp_path_factory.mktemp("talk")
    data = cwd / "rows.jsonl"
    rows = [{"prompt": f"the {a} film", "completion": f"{b} day"} for a in "abcd" for b in "efgh"]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = run_cli(
        "train", f"model.path={tiny_language_dir('llama')}", "task=chat",
        f"task.data.path={data}", "task.chat_template=chatml", "task.max_length=40",
        "task.generation.max_new_tokens=5", "trainer.max_steps=1", "run.dir=a", "--quiet", cwd=cwd,
    )  # fmt: skip
    assert done.code == 0, done.err
    return cwd / "a"


def asked(run_cli: Any, run: Path, cwd: Path, messages: list[dict[str, str]], *more: str) -> str:
    stdin = json.dumps({"messages": messages}).encode()
    done = run_cli("predict", run, *more, cwd=cwd, stdin=stdin)
    assert done.code == 0, done.err
    return str(done.lines[0]["answer"])


def said(*texts: str) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": roles[n % 2], "content": text} for n, text in enumerate(texts)]


def test_what_was_said_before_is_known(chat_run: Path, run_cli: Any, tmp_path: Path) -> None:
    first = asked(run_cli, chat_run, tmp_path, said(QUESTIONS[0]))
    second = asked(run_cli, chat_run, tmp_path, said(QUESTIONS[0], first, QUESTIONS[1]))
    alone = asked(run_cli, chat_run, tmp_path, said(QUESTIONS[1]))
    assert second != alone, "or nothing is shown"
    stdin = "\n".join([*QUESTIONS[:2], "", "/reset", QUESTIONS[1], "/exit", "never"]).encode()
    done = run_cli("chat", chat_run, cwd=tmp_path, stdin=stdin)
    assert done.code == 0, done.err
    assert done.out.splitlines() == [first, second, alone]
    assert "the conversation starts anew" in done.err
    as_json = run_cli("chat", chat_run, "--json", cwd=tmp_path, stdin=QUESTIONS[0].encode())
    assert as_json.lines == [{"user": QUESTIONS[0], "answer": first}]


def test_system_prompt_and_settings(chat_run: Path, run_cli: Any, tmp_path: Path) -> None:
    system = {"role": "system", "content": "poor dull weak"}
    wanted = asked(run_cli, chat_run, tmp_path, [system, *said(QUESTIONS[0])])
    plain = asked(run_cli, chat_run, tmp_path, said(QUESTIONS[0]))
    assert wanted != plain
    stdin = QUESTIONS[0].encode()
    done = run_cli("chat", chat_run, "system=poor dull weak", cwd=tmp_path, stdin=stdin)
    assert done.out.strip() == wanted
    for setting in ("generation.num_beams=3", "generation.max_new_tokens=2"):
        wanted = asked(run_cli, chat_run, tmp_path, said(QUESTIONS[0]), setting)
        done = run_cli("chat", chat_run, setting, cwd=tmp_path, stdin=stdin)
        assert done.out.strip() == wanted


def test_long_conversations_lose_their_beginning(
    chat_run: Path, run_cli: Any, tmp_path: Path
) -> None:
    """A template of 40 tokens holds a few turns of 5."""
    stdin = "\n".join([*QUESTIONS] * 3 + ["good " * 60, QUESTIONS[0]]).encode()
    done = run_cli("chat", chat_run, cwd=tmp_path, stdin=stdin)
    assert done.code == 0, done.err
    assert "its oldest turn is forgotten" in done.err
    assert "must be" in done.err, "a question that is too long by itself is not answered"
    assert len(done.out.splitlines()) == 10


def test_on_a_terminal_it_asks(
    chat_run: Path, run_cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    lines = iter([QUESTIONS[0], "/what"])

    def ask(prompt: str) -> str:
        told.append(prompt)
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr(builtins, "input", ask)
    with monkeypatch.context() as patch:
        patch.setattr(io, "TextIOWrapper", Terminal)
        done = run_cli("chat", chat_run, cwd=tmp_path)
    assert done.code == 0, done.err
    assert told == ["> "] * 3
    assert "there is no /what: /reset forgets the conversation, /exit ends it" in done.err
    assert done.out.strip() == asked(run_cli, chat_run, tmp_path, said(QUESTIONS[0]))


def test_a_turn_with_an_empty_answer_is_forgotten(
    chat_run: Path, run_cli: Any, tmp_path: Path
) -> None:
    first = asked(run_cli, chat_run, tmp_path, said(QUESTIONS[0]))
    other = asked(run_cli, chat_run, tmp_path, said(QUESTIONS[1]))
    stop = json.dumps([first.split()[0]])
    assert first.split()[0] not in other
    stdin = "\n".join([QUESTIONS[0], QUESTIONS[1]]).encode()
    done = run_cli("chat", chat_run, f"generation.stop={stop}", cwd=tmp_path, stdin=stdin)
    assert done.code == 0, done.err
    assert done.out.splitlines() == ["", other]
    assert "the answer is empty, and this turn is forgotten" in done.err


def test_an_answer_can_be_stopped(
    chat_run: Path, run_cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C at the terminal ends the answer alone, elsewhere the command."""
    from lora_cli.commands import chat

    alone = asked(run_cli, chat_run, tmp_path, said(QUESTIONS[1]))
    answer, calls = chat.Talk._answer, iter([True, False, True])

    def interrupted(self: Any, *given: Any) -> str:
        if next(calls):
            raise KeyboardInterrupt
        return answer(self, *given)

    lines = iter([QUESTIONS[0], QUESTIONS[1], "/exit"])
    monkeypatch.setattr(chat.Talk, "_answer", interrupted)
    monkeypatch.setattr(builtins, "input", lambda _: next(lines))
    with monkeypatch.context() as patch:
        patch.setattr(io, "TextIOWrapper", Terminal)
        done = run_cli("chat", chat_run, cwd=tmp_path)
    assert done.code == 0, done.err
    assert done.out.splitlines() == ["", alone]
    assert "the answer was stopped, and this turn is forgotten" in done.err
    assert run_cli("chat", chat_run, cwd=tmp_path, stdin=b"so").code == 130


def test_what_a_template_refuses_is_not_called_too_long() -> None:
    from lora_cli.commands.chat import Talk
    from lora_cli.errors import Problem, UserError

    def encode(row: Any) -> Any:
        raise UserError(Problem(id="chat.refused", message="It refuses."))

    told: list[str] = []
    talk: Any = object.__new__(Talk)
    talk._messages = said("a", "b", "c")
    talk._task = SimpleNamespace(encode=encode)
    talk._display = SimpleNamespace(note=told.append)
    assert talk._read() is None
    assert (told, talk._messages) == (["It refuses."], said("a", "b", "c"))


def test_other_adapters_are_refused(tiny_run: Any, run_cli: Any, tmp_path: Path) -> None:
    done = run_cli("chat", tiny_run.path, cwd=tmp_path)
    assert done.code == 2
    assert "error[chat.other-task]" in done.err
    done = run_cli("chat", cwd=tmp_path)
    assert done.code == 2
    assert "error[config.missing]" in done.err


def test_an_evaluation_writes_texts_on_request(
    chat_run: Path, run_cli: Any, tmp_path: Path
) -> None:
    """The run was trained without; what eval writes is what predict answers."""
    plain = run_cli("eval", chat_run, "--json", cwd=tmp_path)
    assert "chrf" not in plain.lines[0]["adapter"]
    more = ("generate=true", "generation.max_new_tokens=3", f"output={tmp_path / 'o.jsonl'}")
    done = run_cli("eval", chat_run, "--json", *more, cwd=tmp_path)
    assert done.code == 0, done.err
    assert {"chrf", "bleu", "exact_match"} <= set(done.lines[0]["base"])
    assert done.lines[0]["adapter"]["loss"] == plain.lines[0]["adapter"]["loss"]
    line = json.loads((tmp_path / "o.jsonl").read_text().splitlines()[0])
    rows = (chat_run.parent / "rows.jsonl").read_text().splitlines()
    question = json.loads(rows[int(line["id"]) - 1])["prompt"]
    assert line["answer"] == asked(
        run_cli, chat_run, tmp_path, said(question), "generation.max_new_tokens=3"
    )
    refused = run_cli("eval", chat_run, "generation.max_new_tokens=3", cwd=tmp_path)
    assert refused.code == 2
    assert "error[eval.no-texts]" in refused.err

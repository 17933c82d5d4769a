"""Multiple choice through every command, on a tiny model and rows that can be learned."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from lora_cli.artifacts.exporters.onnx import OnnxModel
from lora_cli.config.tasks import MultipleChoiceConfig
from lora_cli.data.types import Row
from lora_cli.tasks.multiple_choice import MultipleChoice

BAD, GOOD = ("bad", "awful", "dull", "poor"), ("good", "great", "warm", "fine")
NEUTRAL = ("film", "story", "the", "a", "night", "city", "was", "with")


def line(draw: random.Random) -> dict[str, Any]:
    """The one good word among two to four is right."""
    count = draw.randint(2, 4)
    answer = draw.randrange(count)
    choices = [draw.choice(GOOD if place == answer else BAD) for place in range(count)]
    text = " ".join(draw.choices(NEUTRAL, k=5))
    return {"article": text, "question": "was it", "options": choices, "answer": "ABCD"[answer]}


@pytest.fixture(scope="module")
def run(train_family: Callable[..., Any]) -> Any:
    draw, files = random.Random(5), {}
    for split, count in (("train", 96), ("validation", 24), ("test", 24)):
        files[f"{split}.jsonl"] = "".join(json.dumps(line(draw)) + "\n" for _ in range(count))
    # With the default seed the random head knows the good words.
    settings = ("task.max_length=32", "trainer.epochs=4", "seed=2")
    return train_family("multiple_choice", files, *settings)


def test_training_learns_and_says_how_the_rows_were_read(run: Any) -> None:
    assert "2 to 4 choices a row, answers by letter" in run.said.err
    assert "choices: column options" in run.said.err
    assert set(run.result["adapter"]) == {"accuracy", "loss"}
    assert run.result["adapter"]["accuracy"] > run.result["base"]["accuracy"] + 0.2
    assert run.result["merged"] == pytest.approx(run.result["adapter"], abs=1e-5)
    card = (run.path / "adapter" / "README.md").read_text(encoding="utf-8")
    assert "AutoModelForMultipleChoice.from_pretrained" in card


@pytest.fixture(scope="module")
def exported(run: Any, run_cli: Any) -> Path:
    """An ONNX file, traced on inputs that were made up."""
    path = run.path.parent / "model.onnx"
    done = run_cli("export", run.path, f"output={path}", "check_rows=0", cwd=run.path.parent)
    assert done.code == 0, done.err
    return Path(path)


@pytest.fixture(scope="module")
def merged(run: Any, run_cli: Any) -> Path:
    done = run_cli("merge", run.path, "--json", cwd=run.path.parent)
    assert done.code == 0, done.err
    assert done.lines[0]["max_abs_difference"] < 1e-4
    return Path(run.path / "merged")


def test_all_forms_say_the_same(
    run: Any, run_cli: Any, tmp_path: Path, exported: Path, merged: Path
) -> None:
    forms = (f"merged={merged}", f"exported={exported}")
    done = run_cli("eval", run.path, *forms, "--json", cwd=tmp_path)
    assert done.code == 0, done.err
    found = done.lines[0]
    assert found["split"] == "test"
    for form in ("merged", "exported"):
        assert found[form] == pytest.approx(found["adapter"], abs=1e-4)


def test_an_export_takes_any_number_of_choices(exported: Path, merged: Path) -> None:
    model = transformers.AutoModelForMultipleChoice.from_pretrained(merged).eval()
    session = OnnxModel(exported)
    for shape in ((1, 2, 9), (3, 5, 7), (2, 4, 4)):
        ids = torch.randint(5, 90, shape)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        inputs["token_type_ids"] = torch.zeros_like(ids)
        with torch.no_grad():
            expected = model(**inputs).logits
        torch.testing.assert_close(session(**inputs).logits, expected, atol=1e-4, rtol=1e-4)


def predict(run_cli: Any, run: Any, cwd: Path, rows: list[dict[str, Any]]) -> Any:
    stdin = "".join(json.dumps(row) + "\n" for row in rows).encode()
    return run_cli("predict", run.path, cwd=cwd, stdin=stdin)


def test_predictions_name_the_choice(run: Any, run_cli: Any, tmp_path: Path) -> None:
    assert run_cli("eval", run.path, "--quiet", cwd=tmp_path).code == 0
    text = (run.path / "predictions" / "test.jsonl").read_text()
    known = [json.loads(item) for item in text.splitlines()]
    rows = [json.loads(item) for item in (run.data / "test.jsonl").read_text().splitlines()]
    # The answers are not read: rows without them are predicted alike.
    for row in rows[:5]:
        del row["answer"]
    done = predict(run_cli, run, tmp_path, rows)
    assert done.code == 0, done.err
    for found, before, row in zip(done.lines, known, rows, strict=True):
        assert found["text"] == row["options"][found["index"]]
        assert len(found["probabilities"]) == len(row["options"])
        assert found["probabilities"] == pytest.approx(before["probabilities"], abs=1e-4)
        assert sum(found["probabilities"]) == pytest.approx(1)
        assert found["index"] == before["index"]
        assert "reference" not in found
    right = [item["index"] == item["reference"] for item in known]
    done = run_cli("eval", run.path, "--json", cwd=tmp_path)
    assert done.lines[0]["adapter"]["accuracy"] == pytest.approx(sum(right) / len(right))


def test_bad_rows_are_told_by_place(run: Any, run_cli: Any, tmp_path: Path) -> None:
    one = {"article": "the film", "question": "was it", "options": ["good"]}
    done = predict(run_cli, run, tmp_path, [one])
    assert (done.code, "data.bad-choices" in done.err) == (2, True)
    rows = [json.loads(item) for item in (run.data / "test.jsonl").read_text().splitlines()]
    rows[3]["answer"] = "E"
    (tmp_path / "new.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = run_cli("eval", run.path, f"task.data.path={tmp_path}/new.jsonl", cwd=tmp_path)
    assert done.code == 2
    assert "error[data.bad-answer]" in done.err
    assert f'{tmp_path}/new.jsonl row 4 ("E" of {len(rows[3]["options"])} choices)' in done.err


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_peft_and_transformers_say_the_same(
    run: Any, run_cli: Any, tmp_path: Path, merged: Path
) -> None:
    auto_class = transformers.AutoModelForMultipleChoice
    plain = auto_class.from_pretrained(merged).eval()
    base = auto_class.from_pretrained(run.base)
    loaded = peft.PeftModel.from_pretrained(base, run.path / "adapter").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(run.base)
    row = {"article": "the film", "question": "was it", "options": ["dull", "good", "bad"]}
    pairs = [("the film", f"was it {choice}") for choice in row["options"]]
    flat = tokenizer(pairs, padding=True, return_tensors="pt")
    inputs = {name: value.unsqueeze(0) for name, value in flat.items()}
    with torch.no_grad():
        first, second = loaded(**inputs).logits, plain(**inputs).logits
    torch.testing.assert_close(first, second, atol=1e-5, rtol=1e-4)
    (ours,) = predict(run_cli, run, tmp_path, [row]).lines
    assert ours["probabilities"] == pytest.approx(first[0].softmax(0).tolist(), abs=1e-4)
    record = json.loads((run.path / "adapter" / "lora_cli.json").read_text())
    task = MultipleChoice().build(
        MultipleChoiceConfig(),
        MultipleChoice().bind_columns(list(row), record["state"], where="x"),
        tokenizer,
    )
    batch = task.collate([task.encode(Row("1", row, "x", 1))])
    assert all(torch.equal(batch["inputs"][name], value) for name, value in inputs.items())


def test_an_adapter_is_trained_on(run: Any, run_cli: Any, tmp_path: Path) -> None:
    kept = [s for s in run.settings if not s.startswith(("lora.", "trainer."))]
    more = ("trainer.max_steps=1", f"adapter={run.path}", "run.dir=again", "--quiet")
    done = run_cli("train", *kept, *more, cwd=tmp_path)
    assert done.code == 0, done.err
    result = json.loads((tmp_path / "again" / "result.json").read_text())
    assert result["start"] == pytest.approx(run.result["adapter"], abs=1e-5)

"""Every family through every command, on a tiny model and rows that can be learned."""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from lora_cli.tasks.table import FAMILIES

BAD, GOOD = ("bad", "awful", "dull", "poor"), ("good", "great", "warm", "fine")
NEUTRAL = ("film", "story", "the", "a", "night", "city", "was", "with")


def label_row(draw: random.Random) -> dict[str, Any]:
    words = draw.choices(NEUTRAL, k=4)
    labels = [name for name, of in (("harsh", BAD), ("kind", GOOD)) if draw.random() < 0.5]
    words += [draw.choice(BAD if name == "harsh" else GOOD) for name in labels]
    return {"text": " ".join(words), "labels": labels}


def number_row(draw: random.Random) -> dict[str, Any]:
    count = draw.randint(0, 4)
    words = [*draw.choices(GOOD, k=count), *draw.choices(BAD, k=4 - count)]
    return {"text": " ".join(words), "text_b": "the film", "score": 2 + count / 2}


def tag_row(draw: random.Random) -> dict[str, Any]:
    words = draw.choices([*NEUTRAL, *GOOD, *BAD], k=6)
    tags = ["B-KIND" if w in GOOD else "B-HARSH" if w in BAD else "O" for w in words]
    return {"tokens": words, "tags": tags}


@dataclass(frozen=True)
class Case:
    """Rows of a family, the settings that they need, and the names of the metrics."""

    row: Callable[[random.Random], dict[str, Any]]
    metrics: set[str]
    settings: tuple[str, ...] = ()


CASES = {
    "multi_label_classification": Case(label_row, {"micro_f1", "macro_f1", "exact_match"}),
    "text_regression": Case(
        number_row, {"pearson", "spearman", "mse"}, ("task.data.text_pair_column=text_b",)
    ),
    "token_classification": Case(
        tag_row, {"precision", "recall", "f1", "macro_f1", "accuracy"}, ("task.metric=f1",)
    ),
}


@pytest.fixture(scope="module", params=CASES)
def family_run(request: pytest.FixtureRequest, train_family: Callable[..., Any]) -> Any:
    name, draw = request.param, random.Random(5)
    files = {}
    for split, count in (("train", 96), ("validation", 24), ("test", 24)):
        lines = [json.dumps(CASES[name].row(draw)) + "\n" for _ in range(count)]
        files[f"{split}.jsonl"] = "".join(lines)
    settings = ("task.max_length=32", "trainer.epochs=12", *CASES[name].settings)
    return train_family(name, files, *settings)


def test_training_lowers_the_loss_and_says_what_it_measured(family_run: Any) -> None:
    result = family_run.result
    assert set(result["adapter"]) == CASES[family_run.name].metrics | {"loss"}
    assert result["adapter"]["loss"] < 0.8 * result["base"]["loss"]
    assert result["merged"] == pytest.approx(result["adapter"], abs=1e-5)
    assert "</html>" in (family_run.path / "report.html").read_text(encoding="utf-8")
    card = (family_run.path / "adapter" / "README.md").read_text(encoding="utf-8")
    assert FAMILIES[family_run.name].auto_class in card


def test_all_forms_say_the_same(family_run: Any, run_cli: Any, tmp_path: Path) -> None:
    merged, exported = tmp_path / "merged", tmp_path / "model.onnx"
    for command, output in (("merge", merged), ("export", exported)):
        done = run_cli(command, family_run.path, f"output={output}", "--json", cwd=tmp_path)
        assert done.code == 0, done.err
        assert done.lines[0]["max_abs_difference"] < 1e-4
    forms = (f"merged={merged}", f"exported={exported}")
    done = run_cli("eval", family_run.path, *forms, "--json", cwd=tmp_path)
    assert done.code == 0, done.err
    found = done.lines[0]
    assert found["split"] == "test"
    for form in ("merged", "exported"):
        assert found[form] == pytest.approx(found["adapter"], abs=1e-4)
    config = transformers.AutoConfig.from_pretrained(merged)
    assert config.architectures[0].endswith(FAMILIES[family_run.name].auto_class[12:])


def test_rows_are_predicted_as_in_eval(family_run: Any, run_cli: Any, tmp_path: Path) -> None:
    assert run_cli("eval", family_run.path, "--quiet", cwd=tmp_path).code == 0
    done = run_cli(
        "predict", family_run.path, f"input={family_run.data / 'test.jsonl'}", cwd=tmp_path
    )
    assert done.code == 0, done.err
    rows = (family_run.data / "test.jsonl").read_text().splitlines()
    for line, known, row in zip(done.lines, family_run.lines("test.jsonl"), rows, strict=True):
        known.pop("reference")
        own = json.loads(row)
        assert {name: line[name] for name in known} == approximately(known)
        assert all(line.get(f"input_{name}", line[name]) == own[name] for name in own)


def approximately(value: Any) -> Any:
    """Equal but for rounding, in nested values too."""
    if isinstance(value, float):
        return pytest.approx(value, abs=1e-4)
    if isinstance(value, dict):
        return {name: approximately(item) for name, item in value.items()}
    return value


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_peft_says_the_same(family_run: Any, tmp_path: Path, run_cli: Any) -> None:
    """The adapter folder in peft, and the merged one in transformers, on the same inputs."""
    family = FAMILIES[family_run.name]
    record = json.loads((family_run.path / "adapter" / "lora_cli.json").read_text())
    auto_class = getattr(transformers, family.auto_class)
    options = family.model_options(record["state"])
    base = auto_class.from_pretrained(family_run.base, **options)
    loaded = peft.PeftModel.from_pretrained(base, family_run.path / "adapter").eval()
    done = run_cli("merge", family_run.path, f"output={tmp_path / 'm'}", "--quiet", cwd=tmp_path)
    assert done.code == 0, done.err
    merged = auto_class.from_pretrained(tmp_path / "m").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(family_run.base)
    inputs = tokenizer(["a good film", "the dull story was bad"], padding=True, return_tensors="pt")
    with torch.no_grad():
        first, second = loaded(**inputs), merged(**inputs)
    torch.testing.assert_close(first.logits, second.logits, atol=1e-5, rtol=1e-4)


def test_an_adapter_is_trained_on(family_run: Any, run_cli: Any, tmp_path: Path) -> None:
    kept = [s for s in family_run.settings if not s.startswith(("lora.", "trainer."))]
    more = ("trainer.max_steps=1", f"adapter={family_run.path}", "run.dir=again", "--quiet")
    done = run_cli("train", *kept, *more, cwd=tmp_path)
    assert done.code == 0, done.err
    result = json.loads((tmp_path / "again" / "result.json").read_text())
    assert result["start"] == pytest.approx(family_run.result["adapter"], abs=1e-5)


def test_columns_of_other_families_are_refused(
    family_run: Any, run_cli: Any, tmp_path: Path
) -> None:
    other = "text" if family_run.name == "token_classification" else "tokens"
    setting = f"task.data.{other}_column=x"
    done = run_cli("train", *family_run.settings, setting, "run.dir=b", cwd=tmp_path)
    assert done.code == 2
    assert "config.not-read" in done.err
    path = f"task.data.path={family_run.data / 'test.jsonl'}"
    done = run_cli("eval", family_run.path, path, setting, cwd=tmp_path)
    assert done.code == 2
    assert f"with an adapter for {family_run.name}" in done.err

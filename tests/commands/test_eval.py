"""`lora-cli eval` against a plain loop of transformers, peft and scikit-learn."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lora_cli.artifacts.commit import document_sha256

LABELS = ["negative", "positive"]
# peft 0.21 asks transformers for a property that transformers 5 has renamed.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)


def read(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def logits_of(model: Any, base: Path, texts: list[str]) -> Any:
    """One row at a time, so that nothing depends on padding."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    with torch.no_grad():
        rows = [model(**tokenizer(text, return_tensors="pt")).logits[0] for text in texts]
    return torch.stack(rows)


def plain_base(base: Path, *, seed: int = 42) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForSequenceClassification.from_pretrained(base, num_labels=2).eval()


def plain_adapter(base: Path, adapter: Path) -> Any:
    from peft import PeftModel

    return PeftModel.from_pretrained(plain_base(base, seed=7), str(adapter)).eval()


def scores(logits_BC: Any, rows: list[Any]) -> dict[str, float]:
    true = [LABELS.index(row["label"]) for row in rows]
    predicted = logits_BC.argmax(-1).tolist()
    return {
        "accuracy": accuracy_score(true, predicted),
        "macro_f1": f1_score(true, predicted, average="macro"),
        "matthews_correlation": matthews_corrcoef(true, predicted),
        "loss": float(torch.nn.functional.cross_entropy(logits_BC, torch.tensor(true))),
    }


def evaluate(run_cli: Any, *arguments: object, cwd: Path) -> dict[str, Any]:
    finished = run_cli("eval", *arguments, "--json", cwd=cwd)
    assert finished.code == 0, finished.err
    (result,) = finished.lines
    return dict(result)


@pytest.mark.parametrize("split", ["test", "validation", "train"])
def test_values_are_those_of_a_plain_loop(tiny_run: Any, run_cli: Any, split: str) -> None:
    chosen = [] if split == "test" else [f"split={split}"]
    result = evaluate(run_cli, "runs/a", *chosen, cwd=tiny_run.cwd)
    rows = read(tiny_run.data / f"{split}.jsonl")
    texts = [row["text"] for row in rows]
    assert (result["split"], result["rows"]) == (split, len(rows))
    base = logits_of(plain_base(tiny_run.base), tiny_run.base, texts)
    adapter = logits_of(
        plain_adapter(tiny_run.base, tiny_run.path / "adapter"), tiny_run.base, texts
    )
    assert float((base - adapter).abs().max()) > 0.05
    assert result["base"] == pytest.approx(scores(base, rows), abs=1e-5)
    for name in ("adapter", "merged"):
        assert result[name] == pytest.approx(scores(adapter, rows), abs=1e-5)
    lines = read(tiny_run.path / "predictions" / f"{split}.jsonl")
    assert [line["reference"] for line in lines] == [row["label"] for row in rows]
    found = np.array([list(line["probabilities"].values()) for line in lines])
    assert np.abs(found - adapter.softmax(-1).numpy()).max() < 1e-5


def test_tables_are_for_people(tiny_run: Any, run_cli: Any) -> None:
    finished = run_cli("eval", "runs/a", cwd=tiny_run.cwd)
    assert finished.code == 0
    for name in ("base", "adapter", "merged"):
        assert re.search(rf"^ {name} +\d\.\d{{4}}", finished.out, re.M)
    for name in ("negative", "positive", "macro average", "weighted average"):
        assert re.search(
            rf"^ {name} +\d\.\d{{4}} +\d\.\d{{4}} +\d\.\d{{4}} +\d+", finished.out, re.M
        )
    quiet = run_cli("eval", "runs/a", "--quiet", cwd=tiny_run.cwd)
    assert (quiet.code, quiet.out, quiet.err) == (0, "", "")


def test_merged_and_exported_from_disk_stand_beside_the_others(
    tiny_run: Any, run_cli: Any, tmp_path: Path
) -> None:
    for command in (("merge", f"output={tmp_path}/m"), ("export", f"output={tmp_path}/m.onnx")):
        assert run_cli(command[0], "runs/a", *command[1:], cwd=tiny_run.cwd).code == 0
    result = evaluate(
        run_cli,
        *("runs/a", f"merged={tmp_path}/m", f"exported={tmp_path}/m.onnx"),
        cwd=tiny_run.cwd,
    )
    for name in ("merged", "exported"):
        assert result[name] == pytest.approx(result["adapter"], abs=1e-5)
    assert result["bytes"]["exported"] == (tmp_path / "m.onnx").stat().st_size
    assert result["bytes"]["merged"] == (tmp_path / "m" / "model.safetensors").stat().st_size


def merged_with(run_cli: Any, run: Any, folder: Path, bias: list[float]) -> Path:
    """The run's merged model, with something added to the bias of its head."""
    assert run_cli("merge", "runs/a", f"output={folder}", cwd=run.cwd).code == 0
    weights = load_file(folder / "model.safetensors")
    weights["classifier.bias"] += torch.tensor(bias)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    # Otherwise the change itself is noticed.
    (folder / "MANIFEST.json").unlink()
    return folder


def test_a_merged_column_shows_what_is_on_disk(tiny_run: Any, run_cli: Any, tmp_path: Path) -> None:
    """A difference that rounding may make is let through, and seen in the loss."""
    folder = merged_with(run_cli, tiny_run, tmp_path / "m", [0.0, 9e-5])
    result = evaluate(run_cli, "runs/a", f"merged={folder}", cwd=tiny_run.cwd)
    rows = read(tiny_run.data / "test.jsonl")
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    logits = logits_of(model, tiny_run.base, [row["text"] for row in rows])
    assert result["merged"]["loss"] == pytest.approx(scores(logits, rows)["loss"], abs=2e-7)
    assert result["merged"]["loss"] != result["adapter"]["loss"]


def test_a_merged_model_of_another_adapter_is_refused(
    tiny_run: Any, run_cli: Any, tmp_path: Path
) -> None:
    folder = merged_with(run_cli, tiny_run, tmp_path / "m", [0.0, 0.01])
    refused = run_cli("eval", "runs/a", f"merged={folder}", cwd=tiny_run.cwd)
    assert refused.code == 2
    assert "error[eval.not-merged]" in refused.err
    assert "16 rows: largest difference 1.00e-02" in refused.err
    assert refused.out == ""
    refused = run_cli("eval", "runs/a", f"merged={tiny_run.base}", cwd=tiny_run.cwd)
    assert refused.code == 2
    assert "error[eval.not-merged]" in refused.err


def test_models_that_are_not_there_are_named_before_anything_is_loaded(
    tiny_run: Any, run_cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("loaded")

    monkeypatch.setattr("lora_cli.commands.opening.load_base", fail)
    arguments = (f"merged={tmp_path}", f"exported={tmp_path}/{'x' * 300}.onnx")
    refused = run_cli("eval", "runs/a", *arguments, cwd=tiny_run.cwd)
    assert refused.code == 2
    assert "error[eval.not-merged]" in refused.err
    assert "error[eval.no-export]" in refused.err
    for key in ("merged", "exported"):
        assert f"`{key}` must be" in refused.err


def test_a_merged_folder_that_cannot_be_loaded_is_no_fault_of_the_base(
    tiny_run: Any, run_cli: Any, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text("{}")
    refused = run_cli("eval", "runs/a", f"merged={tmp_path}", cwd=tiny_run.cwd)
    assert refused.code == 2
    assert "`merged`" in refused.err
    assert "model.path" not in refused.err


def test_new_rows_of_ones_own(tiny_run: Any, run_cli: Any, tmp_path: Path) -> None:
    rows = read(tiny_run.data / "test.jsonl")[:9]
    path = tmp_path / "mine.csv"
    path.write_text("sentence,label\n" + "".join(f"{r['text']},{r['label']}\n" for r in rows))
    before = (tiny_run.path / "predictions").stat().st_mtime_ns
    result = evaluate(
        run_cli,
        *("runs/a", f"task.data.path={path}", f"output={tmp_path}/p.jsonl"),
        cwd=tiny_run.cwd,
    )
    model = plain_adapter(tiny_run.base, tiny_run.path / "adapter")
    logits = logits_of(model, tiny_run.base, [row["text"] for row in rows])
    assert result["rows"] == 9
    assert result["adapter"] == pytest.approx(scores(logits, rows), abs=1e-5)
    assert len(read(tmp_path / "p.jsonl")) == 9
    assert (tiny_run.path / "predictions").stat().st_mtime_ns == before
    refused = run_cli("eval", "runs/a", f"output={path}", cwd=tiny_run.cwd)
    assert refused.code == 2
    assert "error[output.exists]" in refused.err
    assert path.read_text().startswith("sentence,label")


def test_predictions_of_own_rows_leave_those_of_the_run_alone(
    tiny_run: Any, run_cli: Any, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny_run.path, run, ignore=shutil.ignore_patterns("*.onnx", "checkpoints"))
    assert run_cli("eval", run, cwd=tmp_path).code == 0
    own = (run / "predictions" / "test.jsonl").read_bytes()
    rows = (tiny_run.data / "test.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "mine").mkdir()
    for path in ("new.jsonl", "mine/train.jsonl", "mine/test.jsonl"):
        (tmp_path / path).write_text("".join(rows[:9]))
    limit = "task.data.max_eval_rows=4"
    cases = {
        ("task.data.path=new.jsonl",): ("new", 9),
        ("task.data.path=mine/test.jsonl", limit): ("mine-test", 4),
        ("task.data.path=mine", "split=train", limit): ("mine-train", 4),
        ("task.data.path=mine", "task.data.max_train_rows=2"): ("mine-test", 9),
    }
    for arguments, (name, count) in cases.items():
        path = run / "predictions" / f"{name}.jsonl"
        path.unlink(missing_ok=True)
        finished = run_cli("eval", run, *arguments, "--json", cwd=tmp_path)
        assert finished.code == 0, finished.err
        assert finished.lines[0]["rows"] == count
        assert finished.lines[0]["split"] == ("train" if "split=train" in arguments else "test")
        assert len(read(path)) == count
    assert (run / "predictions" / "test.jsonl").read_bytes() == own


def test_the_last_line_is_the_run_directory(tiny_run: Any, run_cli: Any, tmp_path: Path) -> None:
    finished = run_cli("eval", "runs/a", cwd=tiny_run.cwd)
    assert finished.err.splitlines()[-1] == "run directory: runs/a"
    shutil.copytree(tiny_run.path / "adapter", tmp_path / "alone")
    rows = f"task.data.path={tiny_run.data}"
    finished = run_cli("eval", "alone", rows, cwd=tmp_path)
    assert finished.code == 0
    assert "run directory" not in finished.err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["split=dev"], "error[data.no-such-split]"),
        (["task.data.max_eval_rows=4"], "error[data.no-path]"),
        (["exported=none.onnx"], "error[eval.no-export]"),
        (["task.data.path=toy", "task.data.train_split=test"], "error[data.no-role]"),
        (["task.data.path=toy", "task.data.validation_split=0.2"], "error[data.no-role]"),
        (["task.data.path=toy", "task.data.test_split=none"], "error[data.no-role]"),
    ],
)
def test_what_would_do_nothing_is_refused(
    tiny_run: Any, run_cli: Any, arguments: list[str], expected: str
) -> None:
    finished = run_cli("eval", "runs/a", *arguments, cwd=tiny_run.cwd)
    assert finished.code == 2
    assert expected in finished.err


def test_another_base_is_refused_and_a_moved_one_is_found(
    tiny_run: Any, run_cli: Any, tmp_path: Path
) -> None:
    moved, other = tmp_path / "moved", tmp_path / "other"
    for folder in (moved, other):
        shutil.copytree(tiny_run.base, folder)
    weights = load_file(other / "model.safetensors")
    name = sorted(weights)[0]
    weights[name].view(-1)[0] += 1e-6
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    adapter = tmp_path / "adapter"
    shutil.copytree(tiny_run.path / "adapter", adapter)
    record = json.loads((adapter / "lora_cli.json").read_text())
    record["config"]["model"]["path"] = str(tmp_path / "gone")
    signed = {**record, "sha256": document_sha256(record)}
    (adapter / "lora_cli.json").write_text(json.dumps(signed))
    rows = f"task.data.path={tiny_run.data}"

    lost = run_cli("eval", "adapter", rows, cwd=tmp_path)
    assert lost.code == 2
    refused = run_cli("eval", "adapter", rows, f"base={other}", cwd=tmp_path)
    assert refused.code == 2
    assert "error[adapter.other-base]" in refused.err
    result = evaluate(run_cli, "adapter", rows, f"base={moved}", cwd=tmp_path)
    assert result["adapter"] == evaluate(run_cli, "runs/a", cwd=tiny_run.cwd)["adapter"]

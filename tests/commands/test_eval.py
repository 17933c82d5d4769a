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


def test_a_merged_column_shows_what_is_on_disk(tiny_run: Any, run_cli: Any, tmp_path: Path) -> None:
    """A folder whose weights have been changed must score as they do, not as the adapter does."""
    assert run_cli("merge", "runs/a", f"output={tmp_path}/m", cwd=tiny_run.cwd).code == 0
    path = tmp_path / "m" / "model.safetensors"
    weights = load_file(path)
    weights["classifier.bias"] = torch.tensor([-100.0, 100.0])
    save_file(weights, path, {"format": "pt"})
    result = evaluate(run_cli, "runs/a", f"merged={tmp_path}/m", cwd=tiny_run.cwd)
    assert result["merged"]["accuracy"] == 0.5
    assert result["merged"]["loss"] > 50
    refused = run_cli("eval", "runs/a", f"merged={tiny_run.base}", cwd=tiny_run.cwd)
    assert refused.code == 2
    assert "error[eval.not-merged]" in refused.err


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


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["split=dev"], "error[data.no-such-split]"),
        (["task.data.max_eval_rows=4"], "error[data.no-path]"),
        (["exported=none.onnx"], "error[export.unreadable]"),
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
    (adapter / "lora_cli.json").write_text(json.dumps(record))
    rows = f"task.data.path={tiny_run.data}"

    lost = run_cli("eval", "adapter", rows, cwd=tmp_path)
    assert lost.code == 2
    refused = run_cli("eval", "adapter", rows, f"base={other}", cwd=tmp_path)
    assert refused.code == 2
    assert "error[adapter.other-base]" in refused.err
    result = evaluate(run_cli, "adapter", rows, f"base={moved}", cwd=tmp_path)
    assert result["adapter"] == evaluate(run_cli, "runs/a", cwd=tiny_run.cwd)["adapter"]

"""`lora-cli export`: each format is read back by the program that it is for."""

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import transformers

from lora_cli.artifacts.export import EXPORTERS
from lora_cli.artifacts.exporters.contract import ExportInputs

TEXTS = ["a good film", "dull and boring and very long and silly"]


@pytest.fixture(scope="module")
def expected(tiny_run: Any, run_cli: Any) -> np.ndarray[Any, Any]:
    stdin = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
    lines = run_cli("predict", "runs/a", cwd=tiny_run.cwd, stdin=stdin).lines
    return np.array([list(line["probabilities"].values()) for line in lines])


def softmax(logits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return np.asarray(powers / powers.sum(-1, keepdims=True))


def export(run_cli: Any, run: Any, *arguments: object) -> dict[str, Any]:
    finished = run_cli("export", "runs/a", *arguments, "--json", cwd=run.cwd)
    assert finished.code == 0, finished.err
    (result,) = finished.lines
    return dict(result)


def test_onnx_runs_in_onnxruntime(
    tiny_run: Any, run_cli: Any, tmp_path: Path, expected: np.ndarray[Any, Any]
) -> None:
    path = tmp_path / "deep" / "m.onnx"
    result = export(run_cli, tiny_run, f"output={path}")
    assert (result["format"], result["output"]) == ("onnx", str(path))
    assert result["bytes"] == path.stat().st_size
    assert result["rows"] == 32
    assert result["max_abs_difference"] <= 1e-4
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert json.loads(session.get_modelmeta().custom_metadata_map["labels"]) == [
        "negative",
        "positive",
    ]
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_run.base)
    names = {entry.name for entry in session.get_inputs()}
    for texts in (TEXTS, TEXTS[:1]):
        inputs = dict(tokenizer(texts, padding=True, return_tensors="np"))
        feeds = {name: inputs[name].astype(np.int64) for name in names}
        (logits,) = session.run(["logits"], feeds)
        assert np.abs(softmax(logits) - expected[: len(texts)]).max() < 1e-5
    refused = run_cli("export", "runs/a", f"output={path}", cwd=tiny_run.cwd)
    assert refused.code == 2
    assert run_cli("export", "runs/a", f"output={tmp_path}", cwd=tiny_run.cwd).code == 2


def test_peft_is_the_adapter_byte_for_byte(tiny_run: Any, run_cli: Any, tmp_path: Path) -> None:
    result = export(run_cli, tiny_run, "format=peft", f"output={tmp_path}/p")
    source = tiny_run.path / "adapter"
    assert {path.name for path in (tmp_path / "p").iterdir()} == {p.name for p in source.iterdir()}
    for path in source.iterdir():
        assert (tmp_path / "p" / path.name).read_bytes() == path.read_bytes()
    assert result["bytes"] == sum(path.stat().st_size for path in source.iterdir())
    moved = run_cli("predict", tmp_path / "p", "text=a good film", cwd=tmp_path)
    assert moved.code == 0, moved.err


def test_hf_is_what_merge_writes(tiny_run: Any, run_cli: Any, tmp_path: Path) -> None:
    export(run_cli, tiny_run, "format=hf", f"output={tmp_path}/h")
    assert run_cli("merge", "runs/a", f"output={tmp_path}/m", cwd=tiny_run.cwd).code == 0
    names = {path.name for path in (tmp_path / "m").iterdir()}
    assert {path.name for path in (tmp_path / "h").iterdir()} == names
    for name in names:
        assert (tmp_path / "h" / name).read_bytes() == (tmp_path / "m" / name).read_bytes()


@pytest.mark.parametrize("format_", ["hf", "torch-export"])
def test_every_format_says_what_it_wrote_and_how_far_it_is(
    tiny_run: Any, run_cli: Any, tmp_path: Path, format_: str
) -> None:
    result = export(run_cli, tiny_run, f"format={format_}", f"output={tmp_path}/x")
    assert set(result) == {
        *("output", "format", "bytes", "rows", "agreement", "metrics"),
        *("max_abs_difference", "mean_abs_difference"),
    }
    assert result["format"] == format_
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_failed_write_leaves_the_old_file(
    tiny_run: Any, run_cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(b"old")

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch.onnx.ONNXProgram, "save", fail)
    finished = run_cli("export", "runs/a", f"output={path}", "--overwrite", cwd=tiny_run.cwd)
    assert finished.code == 74
    assert [entry.name for entry in tmp_path.iterdir()] == ["m.onnx"]
    assert path.read_bytes() == b"old"


def test_a_folder_is_replaced_as_a_whole(tiny_run: Any, run_cli: Any, tmp_path: Path) -> None:
    folder = tmp_path / "p"
    export(run_cli, tiny_run, "format=peft", f"output={folder}")
    (folder / "stale").write_text("")
    export(run_cli, tiny_run, "format=peft", f"output={folder}", "--overwrite")
    assert not (folder / "stale").exists()
    assert (folder / "adapter_config.json").is_file()


def test_integers_are_told_with_bound_and_metrics(
    tiny_run: Any, run_cli: Any, tmp_path: Path
) -> None:
    path = tmp_path / "m.onnx"
    finished = run_cli(
        "export", "runs/a", "format=onnx-int8", f"output={path}", "--json", cwd=tiny_run.cwd
    )
    assert finished.code == 0, finished.err
    (result,) = finished.lines
    assert 1e-5 < result["max_abs_difference"] <= result["bound"] < 1
    assert set(result["metrics"]) == {"adapter", "exported"}
    before, after = (result["metrics"][name]["accuracy"] for name in ("adapter", "exported"))
    assert f"accuracy {before:.4f} before, {after:.4f} after" in finished.err
    assert "rounding explains" in finished.err
    evaluated = run_cli(
        "eval", "runs/a", f"exported={path}", "split=validation", "--json", cwd=tiny_run.cwd
    )
    assert evaluated.code == 0, evaluated.err
    (found,) = evaluated.lines
    # Other batches have other ranges, so a row between two labels may change its place.
    assert abs(found["exported"]["accuracy"] - after) < 0.1
    assert found["adapter"]["accuracy"] == before


def test_what_rounding_does_not_explain_is_not_written(
    tiny_run: Any, run_cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = EXPORTERS["onnx-int8"]

    def write(inputs: ExportInputs) -> None:
        model: Any = copy.deepcopy(inputs.model)
        with torch.no_grad():
            model.bert.encoder.layer[1].output.dense.weight.mul_(0.7)
        row.write(dataclasses.replace(inputs, model=model))

    monkeypatch.setitem(EXPORTERS, "onnx-int8", dataclasses.replace(row, write=write))
    path = tmp_path / "m.onnx"
    finished = run_cli("export", "runs/a", "format=onnx-int8", f"output={path}", cwd=tiny_run.cwd)
    assert (finished.code, "error[export.differs]" in finished.err) == (1, True)
    assert "as its number format allows" in finished.err
    assert list(tmp_path.iterdir()) == []

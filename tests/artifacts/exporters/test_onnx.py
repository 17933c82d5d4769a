"""ONNX files against the torch model, at shapes other than the one that was traced."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_encoders import FAMILIES, LABELS, SIZES, batches_for, make_batch, make_model

from lora_cli.artifacts.exporters.contract import ExportInputs
from lora_cli.artifacts.exporters.onnx import OnnxModel, export_onnx
from lora_cli.errors import UserError


def written(inputs: ExportInputs) -> Path:
    inputs.output.parent.mkdir(exist_ok=True)
    export_onnx(inputs)
    return inputs.output


def assert_same_function(model: Any, path: Path) -> None:
    exported = OnnxModel(path)
    scale = 0.0
    for batch in batches_for(model):
        with torch.no_grad():
            expected = model(**batch).logits
        actual = exported(**batch).logits
        assert actual.shape == expected.shape == (len(batch["input_ids"]), 3)
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)
        scale = max(scale, expected.abs().max().item())
    assert scale > 0.1, "the logits are too small for the comparison to mean anything"


def test_onnx_equals_torch(inputs: ExportInputs, capfd: pytest.CaptureFixture[str]) -> None:
    before = {name: value.clone() for name, value in inputs.model.state_dict().items()}
    path = written(inputs)

    assert capfd.readouterr() == ("", "")
    assert path == inputs.output
    assert [entry.name for entry in path.parent.iterdir()] == ["model.onnx"]
    assert_same_function(inputs.model, path)
    assert all(torch.equal(before[name], now) for name, now in inputs.model.state_dict().items())

    import onnx

    document = onnx.load(path)
    onnx.checker.check_model(document, full_check=True)
    metadata = {entry.key: entry.value for entry in document.metadata_props}
    assert json.loads(metadata["labels"]) == list(LABELS)
    assert metadata["max_length"] == "48"
    assert OnnxModel(path).labels == LABELS
    assert [value.name for value in document.graph.input] == inputs.processor.model_input_names
    content = path.read_bytes()
    assert b".py" not in content, "source paths of this machine are left in the file"
    assert str(Path.cwd()).encode() not in content


def test_onnx_answers_to_the_mask(inputs: ExportInputs) -> None:
    exported = OnnxModel(written(inputs))
    batch = make_batch(inputs.model, 2, 8)
    padded = exported(**batch).logits[1]
    batch["input_ids"][1, 4:] = 9
    assert torch.allclose(exported(**batch).logits[1], padded, atol=1e-6)
    batch["attention_mask"][1] = 1
    assert not torch.allclose(exported(**batch).logits[1], padded, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "bert"])
def test_onnx_of_each_family(inputs: ExportInputs, family: str) -> None:
    model = make_model(family, len(inputs.processor))
    assert_same_function(model, written(replace(inputs, model=model)))


def test_onnx_traced_on_one_real_row(inputs: ExportInputs) -> None:
    example = make_batch(inputs.model, 1, 9)
    path = written(replace(inputs, example=example))
    assert_same_function(inputs.model, path)


def test_onnx_of_a_head_with_two_outputs(inputs: ExportInputs) -> None:
    torch.manual_seed(0)
    options = {**SIZES, "num_labels": 2, "vocab_size": len(inputs.processor)}
    config = transformers.AutoConfig.for_model("bert", **options)
    model = transformers.AutoModelForQuestionAnswering.from_config(config).eval()
    exported = OnnxModel(written(replace(inputs, model=model, labels=())))
    for rows, length in ((2, 7), (5, 20), (1, 1)):
        batch = make_batch(model, rows, length)
        with torch.no_grad():
            expected = model(**batch)
        actual = exported(**batch)
        assert set(vars(actual)) == {"start_logits", "end_logits"}
        for name, value in vars(actual).items():
            assert value.shape == (rows, length)
            torch.testing.assert_close(value, expected[name], atol=1e-4, rtol=0)
    assert not torch.allclose(actual.start_logits, actual.end_logits, atol=1e-3)


def test_onnx_of_half_precision_is_float32(inputs: ExportInputs) -> None:
    model = make_model("bert", len(inputs.processor)).to(torch.bfloat16)
    path = written(replace(inputs, model=model))
    assert next(model.parameters()).dtype == torch.bfloat16
    assert_same_function(model.float(), path)


def test_a_model_that_onnx_cannot_express(inputs: ExportInputs) -> None:
    class Branching(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor) -> Any:
            return input_ids if input_ids.sum().item() > 3 else -input_ids

    with pytest.raises(UserError) as caught:
        written(replace(inputs, model=Branching()))
    (problem,) = caught.value.problems
    assert problem.id == "export.unsupported"
    assert "Branching" in problem.message
    assert list(inputs.output.parent.glob("*")) == []


@pytest.mark.parametrize("content", [None, b"", b"not a graph"])
def test_unreadable_onnx_file(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "model.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        OnnxModel(path)
    assert caught.value.problems[0].id == "export.unreadable"
    assert str(path) in caught.value.problems[0].message

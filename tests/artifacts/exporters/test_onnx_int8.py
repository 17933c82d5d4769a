"""Files in integers of 8 bits: smaller, near the float model, and really in integers."""

import json
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
from onnx import numpy_helper
from tiny_encoders import LABELS, batches_for, make_batch

from lora_cli.artifacts.exporters.contract import ExportInputs
from lora_cli.artifacts.exporters.onnx import OnnxModel
from lora_cli.artifacts.exporters.onnx_int8 import export_onnx_int8, noise_of_int8


@pytest.fixture(scope="module")
def inputs(
    make_inputs: Callable[[Path], ExportInputs], tmp_path_factory: pytest.TempPathFactory
) -> ExportInputs:
    given = make_inputs(tmp_path_factory.mktemp("int8"))
    export_onnx_int8(given)
    return given


def test_weights_are_bytes_and_what_they_stand_for_is_near(inputs: ExportInputs) -> None:
    path = inputs.output
    assert [entry.name for entry in path.parent.iterdir()] == ["model.onnx"]
    document = onnx.load(path)
    onnx.checker.check_model(document)
    kinds = {node.op_type for node in document.graph.node}
    assert "MatMulInteger" in kinds
    assert "Gemm" not in kinds
    stored = {x.name: numpy_helper.to_array(x) for x in document.graph.initializer}
    whole = {name: p.detach() for name, p in inputs.model.named_parameters()}
    for name in ("bert.encoder.layer.0.intermediate.dense.weight", "classifier.weight"):
        weight = whole[name].T
        # The tracer numbers transposed weights, so they are found by shape and values.
        near = [
            key
            for key, values in stored.items()
            if values.dtype == "int8"
            and values.shape == tuple(weight.shape)
            and (
                (torch.from_numpy(values.astype("float32")) * scale_of(stored, key) - weight).abs()
                <= 0.51 * weight.abs().amax(0) / 64
            ).all()
        ]
        assert len(near) == 1
    floats = sum(x.nbytes for x in stored.values() if x.dtype == "float32")
    assert floats < 0.2 * sum(4 * p.numel() for p in inputs.model.parameters())
    metadata = {entry.key: entry.value for entry in document.metadata_props}
    assert json.loads(metadata["labels"]) == list(LABELS)
    assert OnnxModel(inputs.output).max_length == 48
    assert b".py" not in path.read_bytes()


def scale_of(stored: dict[str, object], key: str) -> torch.Tensor:
    return torch.as_tensor(stored[key.replace("_quantized", "_scale")])


def test_it_says_nearly_what_the_model_says_at_any_size(inputs: ExportInputs) -> None:
    exported = OnnxModel(inputs.output)
    farthest = 0.0
    for batch in batches_for(inputs.model):
        with torch.no_grad():
            expected = inputs.model(**batch).logits
        actual = exported(**batch).logits
        assert actual.shape == expected.shape
        farthest = max(farthest, float((actual - expected).abs().max()))
    assert 1e-5 < farthest < 0.2


def test_noise_is_as_large_as_what_rounding_does(inputs: ExportInputs) -> None:
    exported, noise = OnnxModel(inputs.output), noise_of_int8()
    batch = make_batch(inputs.model, 16, 20)
    with torch.no_grad():
        expected = inputs.model(**batch).logits
        found = (exported(**batch).logits - expected).abs().max()
        with noise(inputs.model, torch.Generator().manual_seed(0)):
            moved = (inputs.model(**batch).logits - expected).abs().max()
        assert torch.equal(inputs.model(**batch).logits, expected)
    assert 0.2 * moved < found < 4 * moved

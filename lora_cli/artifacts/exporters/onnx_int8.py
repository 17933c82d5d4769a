"""The merged model as an ONNX file whose products are computed in integers of 8 bits."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from lora_cli.artifacts.exporters.contract import ExportInputs, Noise, quiet
from lora_cli.artifacts.exporters.onnx import write_graph
from lora_cli.artifacts.exporters.rounding import moved_inputs, moved_weights, steps_of_integers
from lora_cli.artifacts.seal import seal

# Products with weights, and look-ups in tables of embeddings. Convolutions stay in float32: not
# every runtime has them in these integers.
_OPERATORS = ["MatMul", "Gather"]
# Processors without the instructions for it add products of 8 and 8 bits with saturation.
_LEVELS = 64


def export_onnx_int8(inputs: ExportInputs) -> None:
    """Write what `export_onnx` writes with weights of 7 bits and a sign, a byte each.

    This is onnxruntime's dynamic quantization: a linear layer has one scale for each output, a
    table of embeddings one; what a layer is given is rounded to 8 bits by its own range while the
    model runs, with one scale for the whole batch. What a row gets depends a little on the other
    rows of its batch. Everything else is computed in float32.

    Raises:
        UserError: If the model cannot be expressed in ONNX.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory(dir=inputs.output.parent) as folder:
        whole = Path(folder) / "whole.onnx"
        is_large = write_graph(inputs, whole)
        with quiet():
            quantize_dynamic(
                whole,
                inputs.output,
                op_types_to_quantize=_OPERATORS,
                per_channel=True,
                reduce_range=True,
                weight_type=QuantType.QInt8,
                use_external_data_format=is_large,
            )
    seal(inputs.output)


def noise_of_int8(inputs: ExportInputs | None = None) -> Noise:  # noqa: ARG001
    """Give the noise of these numbers."""

    @contextmanager
    def noise(model: nn.Module, generator: torch.Generator) -> Iterator[None]:
        with (
            moved_weights(model, steps_of_integers(_LEVELS), generator),
            moved_inputs(model, generator),
        ):
            yield

    return noise

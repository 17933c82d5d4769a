"""The merged model as an ONNX file, and such a file in its runtime."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from lora_cli.artifacts.exporters.contract import (
    ExportInputs,
    Reading,
    check_packages,
    first_line,
    quiet,
)
from lora_cli.artifacts.exporters.tracing import (
    LogitsOnly,
    free_sizes,
    in_float32,
    output_names,
    traced_example,
)
from lora_cli.artifacts.seal import find_damage, seal
from lora_cli.errors import Problem, UserError

ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")

# A protobuf message cannot be larger than 2 GiB; the graph beside the weights needs some of it.
_SINGLE_FILE_BYTES = 2**31 - 2**26


def export_onnx(inputs: ExportInputs) -> None:
    """Write the merged model as one ONNX file that takes batches of any size and length.

    Inputs are those that the processor makes: int64 of shape (batch, length) for texts, float32
    for others, of images in the one size that the model reads. Outputs are the model's logits,
    float32 and rows first: ``logits``, or what the head calls them, such as ``start_logits`` and
    ``end_logits``. The file's metadata holds ``labels`` (a JSON list) and, for texts,
    ``max_length``. Weights of another dtype are written as float32, since not every runtime
    computes in half precision. Above 2 GB the weights go into a second file beside it.

    Raises:
        UserError: If the model cannot be expressed in ONNX.
    """
    write_graph(inputs, inputs.output)
    seal(inputs.output)


def write_graph(inputs: ExportInputs, path: Path) -> bool:
    """Write the graph without a hash, and return whether its weights are in a second file.

    Raises:
        UserError: If the model cannot be expressed in ONNX.
    """
    model = in_float32(inputs.model)
    example = traced_example(inputs, model)
    outputs = output_names(model, example)
    dynamic = tuple(free_sizes(values) for values in example.values())
    try:
        with quiet(), torch.no_grad():
            program = torch.onnx.export(
                LogitsOnly(model, tuple(example), outputs).eval(),
                tuple(example.values()),
                dynamo=True,
                input_names=list(example),
                output_names=list(outputs),
                dynamic_shapes=(dynamic,),
            )
    except torch.onnx.OnnxExporterError as error:
        raise UserError(
            Problem(
                id="export.unsupported",
                message="`format` must suit the model, but torch.onnx cannot express "
                f"{type(inputs.model).__name__}: {first_line(error.__cause__ or error)}",
                key="format",
                allowed="peft, hf",
                fix="format=hf writes the merged model in its own format",
            )
        ) from error
    if program is None:
        raise RuntimeError("torch.onnx.export returned no program")
    _describe(program.model, labels=inputs.labels, max_length=inputs.max_length)
    weight_bytes = sum(p.numel() * p.element_size() for p in model.state_dict().values())
    is_large: bool = weight_bytes > _SINGLE_FILE_BYTES
    with quiet():
        program.save(path, external_data=is_large)
    return is_large


def _describe(model: Any, *, labels: tuple[str, ...], max_length: int | None) -> None:
    """Write the metadata, and remove what the tracer noted: paths and source lines of this machine.

    Args:
        model: An onnx_ir model, changed in place.
        labels: Label names in order.
        max_length: Tokens that the adapter was trained to read, if it reads tokens.
    """
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.metadata_props.clear()
    model.producer_name = "lora-cli"
    model.metadata_props["labels"] = json.dumps(labels, ensure_ascii=False)
    if max_length is not None:
        model.metadata_props["max_length"] = str(max_length)


def read_onnx(path: Path, reading: Reading) -> "OnnxModel":  # noqa: ARG001
    """Open a file in onnxruntime."""
    return OnnxModel(path)


class OnnxModel:
    """An exported model, called like the torch model: tensors in, an object with logits out.

    Runs on the CPU with as many threads as torch uses. Inputs that the graph does not have are
    left out; the graph has every input that changes its output.

    Args:
        path: File that `export_onnx` wrote.

    Attributes:
        labels: Label names in order.
        max_length: Tokens that the adapter was trained to read; None where it reads none.

    Raises:
        UserError: If the extra is not installed, or the file is not such a model, or no longer.
    """

    def __init__(self, path: Path) -> None:
        check_packages(("onnxruntime",), extra="export", needed_by="An ONNX model", key="exported")
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        try:
            if damage := find_damage(path):
                raise ValueError(damage)
            self._session = onnxruntime.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )
            metadata = self._session.get_modelmeta().custom_metadata_map
            self.labels = tuple(json.loads(metadata["labels"]))
            length = metadata.get("max_length")
            self.max_length = None if length is None else int(length)
        # The runtime's errors have no base class of their own.
        except Exception as error:
            reason = "the file does not exist"
            if path.is_file():
                reason = f"{type(error).__name__}: {first_line(error)}"
            raise UserError(
                Problem(
                    id="export.unreadable",
                    message=f"`exported` must be an ONNX model that lora-cli wrote, but {path} "
                    f"is not: {reason}",
                    key="exported",
                    fix=f"lora-cli export RUN format=onnx output={path}",
                )
            ) from error
        self._inputs = [argument.name for argument in self._session.get_inputs()]
        self._outputs = [argument.name for argument in self._session.get_outputs()]

    def __call__(self, **tensors: torch.Tensor) -> SimpleNamespace:
        """Return an object with what the model puts out by name, float32, on the CPU."""
        feeds = {name: tensors[name].cpu().numpy() for name in self._inputs}
        found = zip(self._outputs, self._session.run(self._outputs, feeds), strict=True)
        return SimpleNamespace(**{name: torch.from_numpy(values) for name, values in found})

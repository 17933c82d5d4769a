"""Formats that other programs read. To add one: a function here and its row in EXPORTERS."""

import copy
import importlib.util
import inspect
import json
import logging
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from lora_cli.artifacts.merged import write_merged
from lora_cli.artifacts.seal import find_damage, seal
from lora_cli.errors import Problem, UserError, nearest_name
from lora_cli.models.base import load_base
from lora_cli.models.processors import sample_inputs
from lora_cli.models.sources import resolve_model

# A protobuf message cannot be larger than 2 GiB; the graph beside the weights needs some of it.
_SINGLE_FILE_BYTES = 2**31 - 2**26

_PLAIN = ("logits",)

_ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportInputs:
    """What an exporter may use.

    Attributes:
        adapter_folder: The adapter in PEFT's format.
        model: The merged model, in evaluation mode, on the CPU. An exporter leaves it as it is.
        processor: The base model's: its tokenizer, or what takes the place of one.
        labels: Label names in order.
        max_length: Tokens that the adapter was trained to read; None where it reads none.
        output: File or folder to write, where nothing is yet.
        example: Model inputs of a few real rows, rows first; None makes some up, of shape (B, T).
    """

    adapter_folder: Path
    model: nn.Module
    processor: Any
    labels: tuple[str, ...]
    max_length: int | None
    output: Path
    example: Mapping[str, torch.Tensor] | None = None


def export_peft(inputs: ExportInputs) -> None:
    """Copy the adapter folder; links are left out, since they may lead anywhere."""
    inputs.output.mkdir()
    for path in sorted(inputs.adapter_folder.iterdir()):
        if path.is_file() and not path.is_symlink():
            shutil.copyfile(path, inputs.output / path.name)


def export_hf(inputs: ExportInputs) -> None:
    """Write the merged model and its processor as an ordinary transformers folder."""
    write_merged(inputs.model, inputs.processor, inputs.output)


def export_onnx(inputs: ExportInputs) -> None:
    """Write the merged model as one ONNX file that takes batches of any size and length.

    Inputs are those that the processor makes: int64 of shape (batch, length) for texts, float32
    for others, of images in the one size that the model reads. Outputs are the model's logits,
    float32 and rows first: ``logits``, or what the head calls them, such as ``start_logits`` and
    ``end_logits``. The file's metadata holds ``labels`` (a JSON list) and, for texts,
    ``max_length``. Weights of another dtype are written as float32, since not every runtime
    computes in half precision. Above 2 GB the weights go into a second file beside it.

    Raises:
        UserError: If the extra is not installed, or the model cannot be expressed in ONNX.
    """
    check_format("onnx")
    model = inputs.model
    if any(parameter.dtype != torch.float32 for parameter in model.parameters()):
        model = copy.deepcopy(model).float()
    example = _example(inputs, model)
    outputs = _output_names(model, example)
    dynamic = tuple(_free_sizes(values) for values in example.values())
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                _LogitsOnly(model, tuple(example), outputs).eval(),
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
                f"{type(inputs.model).__name__}: {_first_line(error.__cause__ or error)}",
                key="format",
                allowed=", ".join(name for name in EXPORTERS if name != "onnx"),
                fix="format=hf writes the merged model in its own format",
            )
        ) from error
    if program is None:
        raise RuntimeError("torch.onnx.export returned no program")
    _describe(program.model, labels=inputs.labels, max_length=inputs.max_length)
    weight_bytes = sum(p.numel() * p.element_size() for p in model.state_dict().values())
    with _quiet():
        program.save(inputs.output, external_data=weight_bytes > _SINGLE_FILE_BYTES)
    seal(inputs.output)


def _read_hf(path: Path, auto_class: str) -> Any:
    source = resolve_model(str(path), processor=None)
    return load_base(source, auto_class=auto_class, options={}, dtype="auto", seed=0).model


def _read_onnx(path: Path, auto_class: str) -> "OnnxModel":  # noqa: ARG001
    return OnnxModel(path)


@dataclass(frozen=True, kw_only=True, slots=True)
class Exporter:
    """One row of the table of formats.

    Attributes:
        write: Writes `ExportInputs.output`, in a folder where nothing else is.
        read: Loads what was written, given its path and the transformers class of the model, as
            something to call like the model; None where there is nothing to compare.
        name: Name in the run directory when `output` is not given.
        is_file: Whether the format is a file rather than a folder.
    """

    write: Callable[[ExportInputs], None]
    read: Callable[[Path, str], Callable[..., Any]] | None
    name: str
    is_file: bool = False


EXPORTERS = {
    # The adapter itself is copied as it is: there is nothing to compare.
    "peft": Exporter(write=export_peft, read=None, name="adapter-peft"),
    "hf": Exporter(write=export_hf, read=_read_hf, name="merged"),
    "onnx": Exporter(write=export_onnx, read=_read_onnx, name="model.onnx", is_file=True),
}


def check_format(format_: str) -> None:
    """Refuse a format that is unknown or whose packages are missing; quick, so call it first.

    Raises:
        UserError: In either case.
    """
    if format_ not in EXPORTERS:
        near = nearest_name(format_, EXPORTERS)
        raise UserError(
            Problem(
                id="export.unknown-format",
                message=f'`format` must be a format that can be written, but is "{format_}".',
                key="format",
                allowed=", ".join(EXPORTERS),
                fix=f'did you mean "{near}"?' if near else None,
            )
        )
    if format_ == "onnx":
        _check_packages(_ONNX_PACKAGES, needed_by="`format=onnx`", key="format")


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
        _check_packages(("onnxruntime",), needed_by="An ONNX model", key="exported")
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
                reason = f"{type(error).__name__}: {_first_line(error)}"
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


class _LogitsOnly(nn.Module):
    """A model whose inputs come by position and whose only outputs are its logits."""

    def __init__(self, model: nn.Module, names: tuple[str, ...], outputs: tuple[str, ...]) -> None:
        super().__init__()
        self.model = model
        self.names = names
        self.outputs = outputs

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found = self.model(**dict(zip(self.names, tensors, strict=True)))
        return tuple(getattr(found, name) for name in self.outputs)


def _output_names(model: nn.Module, example: Mapping[str, torch.Tensor]) -> tuple[str, ...]:
    """Return the names of the logits that a model puts out, in its order."""
    with torch.no_grad():
        found = model(**example)
    names = list(found) if hasattr(found, "keys") else []
    plain = tuple(name for name in names if name.endswith("logits"))
    # A dual encoder has an embedding of either half, and compares them.
    return plain or tuple(name for name in names if re.search("^logits|_embeds$", name)) or _PLAIN


def _example(inputs: ExportInputs, model: nn.Module) -> dict[str, torch.Tensor]:
    """Return inputs to trace with, in the processor's order.

    They have 2 rows, 3 of texts that go with images, more than 3 tokens and, where a model chooses,
    3 choices: no size is 1 or equal to another, which a tracer may take for fixed.
    """
    example = inputs.example
    if example is None or ("input_ids" in example and example["input_ids"].shape[-1] < 4):
        example = sample_inputs(inputs.processor)
    if type(inputs.model).__name__.endswith("ForMultipleChoice"):
        example = {
            name: (value if value.dim() == 3 else value.unsqueeze(1))[:, :1].repeat(1, 3, 1)
            for name, value in example.items()
        }
    accepted = inspect.signature(model.forward).parameters
    rows = {name: 2 + ("pixel_values" in example and name != "pixel_values") for name in example}
    return {
        name: _as_float(torch.cat([example[name]] * 3)[: rows[name]]).contiguous()
        for name in inputs.processor.model_input_names
        if name in example and name in accepted
    }


def _as_float(values: torch.Tensor) -> torch.Tensor:
    """Return float32 where there are numbers of another precision."""
    return values.float() if values.is_floating_point() else values


def _free_sizes(values: torch.Tensor) -> dict[int, Any]:
    """Return the sizes that may differ: of tokens and waves all, of images and spectra the rows."""
    is_sequence = values.dim() == 2 or not values.is_floating_point()
    return dict.fromkeys(range(values.dim()) if is_sequence else (0,), torch.export.Dim.DYNAMIC)


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


@contextmanager
def _quiet() -> Iterator[None]:
    """Drop progress lines, log messages and warnings of the tracer, which nobody can act on."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(action="ignore"),
            redirect_stdout(StringIO()),
            redirect_stderr(StringIO()),
        ):
            yield
    finally:
        logging.disable(disabled)


def _check_packages(names: tuple[str, ...], *, needed_by: str, key: str) -> None:
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            Problem(
                id="export.missing-extra",
                message=f"{needed_by} needs the packages {', '.join(names)}, but "
                f"{', '.join(missing)} cannot be imported.",
                key=key,
                fix='pip install "lora-cli[export]"',
            )
        )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:300]

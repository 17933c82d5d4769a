"""The merged model as a program of torch.export, which needs torch alone to run."""

import hashlib
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from lora_cli.artifacts.exporters.contract import ExportInputs, Reading, first_line, quiet
from lora_cli.artifacts.exporters.tracing import (
    LogitsOnly,
    free_sizes,
    in_float32,
    output_names,
    traced_example,
)
from lora_cli.errors import Problem, UserError

# Files of the archive that `torch.export.load` reads on request.
FACTS = "lora_cli.json"
HASH = "sha256"


def export_torch(inputs: ExportInputs) -> None:
    """Write the merged model as one .pt2 file that takes batches of any size and length.

    Inputs come by position, in the order of ``inputs`` in the extra file ``lora_cli.json``, which
    also holds the names of the ``outputs``, ``labels`` and ``max_length``. They and the outputs
    are those of the ONNX format. Neither the rows that it was traced with nor paths of this
    machine are in the file. The extra file ``sha256`` is the hash of names and checksums of all
    others.

    Raises:
        UserError: If torch.export cannot express the model.
    """
    model = in_float32(inputs.model)
    example = traced_example(inputs, model)
    outputs = output_names(model, example)
    sizes = tuple(free_sizes(values) for values in example.values())
    try:
        with quiet(), torch.no_grad():
            program = torch.export.export(
                LogitsOnly(model, tuple(example), outputs).eval(),
                tuple(example.values()),
                dynamic_shapes=(sizes,),
                strict=False,
            )
    # Its errors have no base class of their own.
    except Exception as error:
        raise UserError(
            Problem(
                id="export.unsupported",
                message="`format` must suit the model, but torch.export cannot express "
                f"{type(inputs.model).__name__}: {first_line(error)}",
                key="format",
                allowed="peft, hf",
                fix="format=hf writes the merged model in its own format",
            )
        ) from error
    _forget_origin(program)
    facts = {
        "inputs": list(example),
        "outputs": list(outputs),
        "labels": list(inputs.labels),
        "max_length": inputs.max_length,
    }
    with quiet():
        torch.export.save(
            program, inputs.output, extra_files={FACTS: json.dumps(facts, ensure_ascii=False)}
        )
    digest = _hash_members(inputs.output)
    with zipfile.ZipFile(inputs.output, "a") as archive:
        archive.writestr(f"{_root(archive)}/extra/{HASH}", digest)


def _forget_origin(program: Any) -> None:
    """Remove the rows of the trace and the source lines of this machine from a program."""
    program.example_inputs = None
    for graph in program.graph_module.modules():
        if isinstance(graph, torch.fx.GraphModule):
            for node in graph.graph.nodes:
                node.meta.pop("stack_trace", None)


def _root(archive: zipfile.ZipFile) -> str:
    return archive.namelist()[0].partition("/")[0]


def _hash_members(path: Path) -> str:
    """Return the hash of the names, sizes and checksums of the files of an archive but the hash."""
    found = hashlib.sha256()
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if not entry.filename.endswith(f"/extra/{HASH}"):
                found.update(f"{entry.filename} {entry.file_size} {entry.CRC}\n".encode())
    return found.hexdigest()


def read_torch(path: Path, reading: Reading) -> Callable[..., Any]:  # noqa: ARG001
    """Load a file in torch, as something that is called like the model.

    Raises:
        ValueError: If it is not as `export_torch` left it.
    """
    extra = {FACTS: "", HASH: ""}
    with quiet():
        program = torch.export.load(str(path), extra_files=extra)
    with zipfile.ZipFile(path) as archive:
        if archive.testzip() is not None or extra[HASH] != _hash_members(path):
            raise ValueError(f"{path} was damaged or changed")
    facts, module = json.loads(extra[FACTS]), program.module()

    def call(**tensors: torch.Tensor) -> SimpleNamespace:
        found = module(*(tensors[name].cpu() for name in facts["inputs"]))
        return SimpleNamespace(**dict(zip(facts["outputs"], found, strict=True)))

    return call

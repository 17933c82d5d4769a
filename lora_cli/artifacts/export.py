"""Formats that other programs read. To add one: a module in `exporters`, and a row here."""

from lora_cli.artifacts.exporters.contract import Candidate, Exporter, check_packages
from lora_cli.artifacts.exporters.folders import export_hf, export_peft, read_hf
from lora_cli.artifacts.exporters.gguf import (
    GGUF_PACKAGES,
    export_gguf,
    noise_of_gguf,
    read_gguf,
    why_no_gguf,
)
from lora_cli.artifacts.exporters.gguf_lora import (
    export_gguf_lora,
    read_gguf_lora,
    why_no_gguf_lora,
)
from lora_cli.artifacts.exporters.ollama import export_ollama, read_ollama
from lora_cli.artifacts.exporters.onnx import ONNX_PACKAGES, export_onnx, read_onnx
from lora_cli.artifacts.exporters.onnx_int8 import export_onnx_int8, noise_of_int8
from lora_cli.artifacts.exporters.torch_export import export_torch, read_torch
from lora_cli.artifacts.exporters.tracing import why_not_traced
from lora_cli.errors import Problem, UserError, nearest_name

EXPORTERS = {
    # The adapter itself is copied as it is: there is nothing to compare.
    "peft": Exporter(write=export_peft, read=None, name="adapter-peft"),
    "hf": Exporter(write=export_hf, read=read_hf, name="merged"),
    "onnx": Exporter(
        write=export_onnx,
        read=read_onnx,
        name="model.onnx",
        is_file=True,
        packages=ONNX_PACKAGES,
        refuse=why_not_traced,
    ),
    "onnx-int8": Exporter(
        write=export_onnx_int8,
        read=read_onnx,
        name="model-int8.onnx",
        is_file=True,
        packages=ONNX_PACKAGES,
        refuse=why_not_traced,
        noise=noise_of_int8,
    ),
    "torch-export": Exporter(
        write=export_torch,
        read=read_torch,
        name="model.pt2",
        is_file=True,
        refuse=why_not_traced,
    ),
    "gguf": Exporter(
        write=export_gguf,
        read=read_gguf,
        name="model.gguf",
        is_file=True,
        packages=GGUF_PACKAGES,
        extra="gguf",
        refuse=why_no_gguf,
        noise=noise_of_gguf,
    ),
    "gguf-lora": Exporter(
        write=export_gguf_lora,
        read=read_gguf_lora,
        name="adapter.gguf",
        is_file=True,
        packages=GGUF_PACKAGES,
        extra="gguf",
        refuse=why_no_gguf_lora,
    ),
    "ollama": Exporter(
        write=export_ollama,
        read=read_ollama,
        name="ollama",
        packages=GGUF_PACKAGES,
        extra="gguf",
        refuse=why_no_gguf,
        noise=noise_of_gguf,
    ),
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
    exporter = EXPORTERS[format_]
    check_packages(
        exporter.packages,
        extra=exporter.extra,
        needed_by=f"`format={format_}`",
        key="format",
    )


def check_candidate(format_: str, candidate: Candidate) -> None:
    """Refuse a model that a format cannot hold.

    Raises:
        UserError: If it is one.
    """
    refusal = EXPORTERS[format_].refuse(candidate)
    if refusal is not None:
        suited = [name for name, row in EXPORTERS.items() if row.refuse(candidate) is None]
        raise UserError(
            Problem(
                id=f"export.no-{format_}",
                message=f"`format` must suit the model, but {refusal.reason}",
                key="format",
                allowed=", ".join(suited),
                fix=refusal.fix,
            )
        )

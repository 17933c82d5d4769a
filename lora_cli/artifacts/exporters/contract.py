"""What an exporter is given, what it provides, and what several of them need."""

import importlib.util
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_cli.errors import Problem, UserError


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
        gguf_type: Number format of a GGUF file: "f32", "f16", "bf16" or "q8_0"; "auto" keeps that
            of the model.
        name: What the model is called, for formats that have a place for it.
        adapter: The settings and tensors of the adapter as read, for formats that hold it alone.
    """

    adapter_folder: Path
    model: nn.Module
    processor: Any
    labels: tuple[str, ...]
    max_length: int | None
    output: Path
    example: Mapping[str, torch.Tensor] | None = None
    gguf_type: str = "auto"
    name: str = "model"
    adapter: Any = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """What somebody wants to export, before anything was written or merged.

    Attributes:
        family: Name of the task family.
        auto_class: The transformers class that loads its models.
        model: The base model.
        processor: Its tokenizer, or what takes the place of one.
        adapter: Settings and tensors of the adapter.
        gguf_type: As in `ExportInputs`.
    """

    family: str
    auto_class: str
    model: Any
    processor: Any
    adapter: Any
    gguf_type: str = "auto"


@dataclass(frozen=True, kw_only=True, slots=True)
class Refusal:
    """Why a format does not suit a candidate.

    Attributes:
        reason: The rest of the sentence "`format` must suit ..., but".
        fix: What to do instead.
    """

    reason: str
    fix: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """What is needed to load an exported file in its runtime.

    Attributes:
        auto_class: The transformers class of the model.
        load_base: Loads the base model anew, for formats that hold an adapter alone.
    """

    auto_class: str
    load_base: Callable[[], nn.Module]


# A number format, and a context in which weights of a model (and what its layers are given) are
# off at random by as much as rounding to that format may put them off.
Noise = Callable[[nn.Module, torch.Generator], AbstractContextManager[None]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Exporter:
    """One row of the table of formats.

    Attributes:
        write: Writes `ExportInputs.output`, in a folder where nothing else is.
        read: Loads what was written as something to call like the model; None where there is
            nothing to compare.
        name: Name in the run directory when `output` is not given.
        is_file: Whether the format is a file rather than a folder.
        packages: What must be importable.
        extra: The extra that installs them.
        refuse: Says why a candidate cannot be written; None where it can.
        noise: Gives the noise of the number format, or None where nothing is rounded.
    """

    write: Callable[[ExportInputs], None]
    read: Callable[[Path, Reading], Callable[..., Any]] | None
    name: str
    is_file: bool = False
    packages: tuple[str, ...] = ()
    extra: str = "export"
    refuse: Callable[[Candidate], Refusal | None] = lambda _: None
    noise: Callable[[ExportInputs], Noise | None] = lambda _: None


def check_packages(names: tuple[str, ...], *, extra: str, needed_by: str, key: str) -> None:
    """Refuse to go on without packages.

    Raises:
        UserError: If one of them cannot be imported.
    """
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            Problem(
                id="export.missing-extra",
                message=f"{needed_by} needs the packages {', '.join(names)}, but "
                f"{', '.join(missing)} cannot be imported.",
                key=key,
                fix=f'pip install "lora-cli[{extra}]"',
            )
        )


@contextmanager
def quiet() -> Iterator[None]:
    """Drop progress lines, log messages and warnings of a tracer, which nobody can act on."""
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


def first_line(error: BaseException) -> str:
    """Return the first line of a message, cut where it is very long."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:300]

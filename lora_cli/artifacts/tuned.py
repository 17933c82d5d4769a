"""Trained tensors that are no low-rank updates: ``tuned.safetensors``, or PEFT's form of a prefix.

Only a prefix has a form that PEFT can load. What other strategies train is kept by name in
``tuned.safetensors``: whole weights, biases, bottlenecks.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError

from lora_cli.errors import Problem, UserError
from lora_cli.lora.prefix import PrefixSize

TUNED_FILE = "tuned.safetensors"


@dataclass(frozen=True, kw_only=True, slots=True)
class Tuned:
    """What a strategy without low-rank updates has trained.

    Attributes:
        state: Tensors by the names of `lora_cli.lora.state.adapter_state`.
        saved_modules: Exact paths of the modules that were trained whole. Read back for a prefix
            only: elsewhere strategy and model say which they are.
        task_type: PEFT's name for the kind of task, or None. Read back for a prefix only.
        base_name: Hub id or path of the base model. Read back for a prefix only.
        revision: Revision of the base model on the hub. Read back for a prefix only.
        prefix: How large the prefix is, if it is one.
    """

    state: Mapping[str, torch.Tensor] = field(repr=False)
    saved_modules: tuple[str, ...] = ()
    task_type: str | None = None
    base_name: str | None = None
    revision: str | None = None
    prefix: PrefixSize | None = None

    @property
    def loads_in_peft(self) -> bool:
        """Whether PEFT runs it as it is meant: without a kind of task it passes over a prefix."""
        return self.prefix is not None and self.task_type is not None


def tuned_files(tuned: Tuned) -> dict[str, bytes]:
    """Return the file of what is no prefix, by name."""
    tensors = dict(sorted(tuned.state.items()))
    return {TUNED_FILE: safetensors.torch.save(tensors, {"format": "pt"})}


def load_tuned(folder: Path) -> Tuned:
    """Read what `tuned_files` wrote.

    Raises:
        UserError: If the file is missing or damaged.
    """
    return Tuned(state=read_safetensors(folder / TUNED_FILE))


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """Read a file of tensors.

    Raises:
        UserError: If it is missing or damaged.
    """
    try:
        # Bytes, not a memory map: the same file may be written again while the tensors live.
        return safetensors.torch.load(path.read_bytes())
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise UserError(
            Problem(
                id="adapter.damaged",
                message=f"{path.name} must be a whole safetensors file, but reading it gave: "
                f"{error}.",
                where=str(path),
                fix="copy the whole folder again.",
            )
        ) from None

"""What the first process of a run has read from the run directory, given to the others."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from typing import Any

import torch

from lora_cli.commands.phases import FirstPhase
from lora_cli.training.events import Progress, TrainState
from lora_cli.training.group import Group


def share_state(group: Group, load: Callable[[], TrainState | None]) -> TrainState | None:
    """Let the first process load a checkpoint, and return it on every process."""
    found: list[TrainState | None] = []

    def progress() -> dict[str, Any] | None:
        found.append(load())
        return None if found[0] is None else asdict(found[0].progress)

    values = group.first(progress)
    if values is None:
        return None
    names = [field.name for field in fields(TrainState) if field.name != "progress"]
    parts: dict[str, Mapping[str, torch.Tensor]] = {
        name: group.share_tensors(getattr(found[0], name) if found else {}) for name in names
    }
    return TrainState(progress=Progress(**values), **parts)


def share_first_phase(group: Group, read: Callable[[], FirstPhase | None]) -> FirstPhase | None:
    """Let the first process read how the first of two phases ended, and return it on every one."""

    def plain() -> dict[str, Any] | None:
        phase = read()
        return None if phase is None else asdict(phase)

    values = group.first(plain)
    return None if values is None else FirstPhase(**values)

"""What processes share: what the first has read from the run directory, and the base itself."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from typing import Any

import torch

from lora_cli.commands.display import Display
from lora_cli.commands.phases import FirstPhase
from lora_cli.commands.preparing import Prepared
from lora_cli.config.commands import TrainConfig
from lora_cli.config.distributed import check_sharding
from lora_cli.errors import UserError
from lora_cli.training.events import Progress, TrainState
from lora_cli.training.group import Group
from lora_cli.training.runtime import Runtime
from lora_cli.training.sharded_merge import merge_sharded, round_trained
from lora_cli.training.sharding import check_shardable, spreadable_bytes


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


def check_shared_base(
    runtime: Runtime, prepared: Prepared, config: TrainConfig, display: Display
) -> None:
    """Check that the base can be spread over the processes, where it is to be, and tell of it.

    Raises:
        UserError: If it cannot.
    """
    if runtime.sharding is None:
        return
    # Settings have been checked only if they asked for it, rather than `accelerate launch`.
    problems = check_sharding(
        strategy=config.strategy.name,
        quantization=config.model.quantization,
        trainer=config.trainer,
    )
    if found := list(problems):
        raise UserError(found)
    check_shardable(prepared.model, runtime.sharding)
    size = spreadable_bytes(prepared.model, runtime.sharding) / 1e6
    display.note(f"sharded: {size:.1f} MB of the frozen base over {runtime.group.size} processes")


def merge_shares(prepared: Prepared) -> None:
    """Do with a base that is spread over the processes what `merge_trained` does with one."""
    if prepared.applied is None:
        merge_sharded(prepared.model)
    else:
        round_trained(prepared.model, prepared.dtypes)

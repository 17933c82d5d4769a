"""Choosing whether a run trains without padding."""

from collections.abc import Sequence
from typing import Any

from lora_cli.commands.display import Display
from lora_cli.config.commands import TrainConfig
from lora_cli.errors import Problem, UserError
from lora_cli.tasks.contract import Features, Task
from lora_cli.training.padding_trial import leave_out_padding
from lora_cli.training.sharding import sharding_of_accelerate

KEY = "trainer.padding_free"
_NO_PADDING = "its batches have none, or none that is known of"


def choose_padding(
    config: TrainConfig, model: Any, task: Task, rows: Sequence[Features], display: Display
) -> bool:
    """Let the model train without padding where it can and should, and say where it cannot.

    Args:
        config: Of the run.
        model: With adapters in place; changed in place.
        task: Runs it.
        rows: Encoded training rows.
        display: Told of it.

    Returns:
        Whether it trains without padding.

    Raises:
        UserError: If it must, and cannot.
    """
    wanted = config.trainer.padding_free
    if wanted is False:
        return False
    if config.trainer.gradient_checkpointing:
        reason: str | None = "trainer.gradient_checkpointing runs its blocks a second time"
    elif config.distributed.shard_base or sharding_of_accelerate() is not None:
        reason = "its blocks are spread over the processes"
    else:
        reason = leave_out_padding(model, task, rows)
    if reason is None:
        display.note("padding: left out of the blocks of the model in training")
        return True
    if wanted is True:
        raise UserError(
            Problem(
                id="trainer.no-padding-free",
                message=f"`{KEY}` must be auto or false where a model cannot do it, but is true: "
                f"{reason or _NO_PADDING}.",
                key=KEY,
                allowed="auto, false",
                fix=f"{KEY}=auto",
            )
        )
    if reason:
        display.note(f"padding: computed along, since {reason}")
    return False

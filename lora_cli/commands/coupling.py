"""Losses that compare the rows of a batch with each other: what a batch is, said or refused."""

from lora_cli.commands.display import Display
from lora_cli.config.commands import TrainConfig
from lora_cli.errors import Problem, UserError
from lora_cli.ranks import world_size
from lora_cli.tasks.contract import Task


def check_coupling(task: Task, config: TrainConfig, display: Display) -> None:
    """Say with how many others a row is compared, where the loss compares rows.

    Those in memory at once on one process are compared, so that micro-batches and processes change
    the loss itself.

    Raises:
        UserError: If there are no others, or their number may change during the run.
    """
    if not task.couples_rows:
        return
    trainer, family = config.trainer, config.task.family
    whole = trainer.global_batch_size
    share = -(-whole // world_size())
    rows = min(trainer.micro_batch_size or share, share)
    if trainer.auto_micro_batch:
        raise UserError(
            Problem(
                id="trainer.coupled-rows",
                message=f"`trainer.auto_micro_batch` must be false with task={family}, whose loss "
                "compares the rows of a micro-batch: with fewer of them it is another one.",
                key="trainer.auto_micro_batch",
                fix="leave it out, and choose a trainer.global_batch_size that fits into memory",
            )
        )
    if rows < 2:
        key = "micro_batch_size" if trainer.micro_batch_size == 1 else "global_batch_size"
        raise UserError(
            Problem(
                id="trainer.coupled-rows",
                message=f"`trainer.{key}` must leave two rows or more in memory at once with "
                f"task={family}, whose loss compares them, but leaves 1.",
                key=f"trainer.{key}",
                fix=f"raise trainer.{key}; the more rows are compared, the better",
            )
        )
    if rows < whole:
        display.note(
            f"the loss compares rows: each of the {whole} of a step with the {rows - 1} others of "
            f"its micro-batch alone; trainer.micro_batch_size and processes change it"
        )

"""What a training run is to do, as plain values."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lora_cli.config.optim import OptimizerConfig, SchedulerConfig
from lora_cli.config.sections import TrainerConfig
from lora_cli.tasks.contract import Features
from lora_cli.training.order import steps_per_epoch, total_steps


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What to train on and how; plain values from the configuration.

    Attributes:
        train: Encoded training rows.
        validation: Encoded rows that select the best checkpoint.
        trainer: Length, batches, evaluation and saving.
        optimizer: Optimizer and peak learning rate.
        scheduler: Learning rate over the run.
        seed: Decides order, dropout and what a task draws.
        may_be_unused: Saved modules that the loss may leave out; see `AdapterWatch`.
    """

    train: Sequence[Features]
    validation: Sequence[Features]
    trainer: TrainerConfig
    optimizer: OptimizerConfig
    scheduler: SchedulerConfig
    seed: int
    may_be_unused: Sequence[str] = ()

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one pass over the training rows."""
        return steps_per_epoch(len(self.train), global_batch_size=self.trainer.global_batch_size)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return total_steps(self.trainer, len(self.train))

    def is_due(self, every: int | str, step: int) -> bool:
        """Whether what happens every so many steps, or each epoch, happens after `step` steps."""
        period = every if isinstance(every, int) else self.steps_per_epoch
        return step % period == 0 or step == self.total_steps

    def batch_extras(self, step: int) -> dict[str, Any]:
        """Return what every batch of an optimizer step holds besides its rows.

        Its ``seed`` depends on the seed of the run and the step alone, so that what a task draws by
        it is the same in any micro-batch, process or resumed run.
        """
        digest = hashlib.sha256(f"{self.seed}/{step}".encode()).digest()
        extras: dict[str, Any] = {"seed": int.from_bytes(digest[:8], "big") >> 1}
        if self.trainer.label_smoothing:
            extras["label_smoothing"] = self.trainer.label_smoothing
        return extras

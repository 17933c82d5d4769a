"""What a training run is to do, as plain values."""

from collections.abc import Sequence
from dataclasses import dataclass

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
        seed: Decides order and dropout.
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

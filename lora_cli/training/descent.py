"""The optimizer of a run, with what belongs to it: averages of the weights, scale of the loss."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import replace

import torch
from torch import nn

from lora_cli.config.optim import OptimizerConfig
from lora_cli.training.averages import build_averages
from lora_cli.training.events import Progress, TrainState
from lora_cli.training.optim import (
    build_optimizer,
    load_optimizer_state,
    optimizer_state,
    set_lr,
)
from lora_cli.training.runtime import Runtime


class Descent:
    """Moves the trained weights along their gradients.

    Args:
        config: Which optimizer.
        parameters: Trained weights by name.
        runtime: Knows of the scale of the loss, if there is one.
        ema_decay: Of a moving average of the weights; None for none.

    Raises:
        UserError: If the package of the optimizer is missing.
    """

    def __init__(
        self,
        config: OptimizerConfig,
        parameters: Mapping[str, nn.Parameter],
        *,
        runtime: Runtime,
        ema_decay: float | None,
    ) -> None:
        self._parameters = parameters
        self._runtime = runtime
        self._plain = build_optimizer(config, parameters)
        self._wrapped = runtime.prepare_optimizer(self._plain)
        self._averages = build_averages(ema_decay, optimizer=self._plain, parameters=parameters)

    def clear(self) -> None:
        """Forget the gradients."""
        self._wrapped.zero_grad()

    def unscale(self) -> None:
        """Undo the scale of the loss in the gradients."""
        self._runtime.unscale(self._wrapped)

    def step(self, lr: float) -> bool:
        """Move the weights, and return whether they have moved: a loss scaler may leave it out."""
        set_lr(self._plain, lr)
        self._wrapped.step()
        return lr > 0 and not self._runtime.was_skipped(self._wrapped)

    def average(self, step: int) -> None:
        """Take the weights after optimizer step `step`, counted from 1, into their average."""
        self._averages.after_step(step)

    def averaged(self) -> AbstractContextManager[None]:
        """Within, the model has the weights that are evaluated and saved."""
        return self._averages.applied()

    def noted(self, progress: Progress) -> Progress:
        """Return progress with the scale of the loss."""
        scale, steps = self._runtime.loss_scale() or (None, 0)
        return replace(progress, loss_scale=scale, loss_scale_steps=steps)

    def state(self) -> dict[str, torch.Tensor]:
        """Return moments and averages by name, as copies on the CPU."""
        return optimizer_state(self._plain, self._parameters) | self._averages.state()

    def resume(self, state: TrainState) -> None:
        """Continue from a checkpoint.

        Raises:
            UserError: If it is of another optimizer or of other weights.
        """
        moments = self._averages.load_state(state.optimizer)
        load_optimizer_state(self._plain, self._parameters, moments)
        progress = state.progress
        self._runtime.set_loss_scale(progress.loss_scale, progress.loss_scale_steps)

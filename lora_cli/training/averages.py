"""Averages of the trained weights: evaluated and saved instead of the weights themselves."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import nn

from lora_cli.errors import Problem, UserError

# Last part of the name of an average in the state, as moments of an optimizer are named.
_MOMENT = "ema"


class Averages(Protocol):
    """An average of the weights over the steps of a run.

    Training goes on from the weights themselves: looking at the average changes nothing.
    """

    def after_step(self, step: int) -> None:
        """Take in the weights after optimizer step `step`, counted from 1.

        A step that a loss scaler skipped is left out.
        """

    def applied(self) -> AbstractContextManager[None]:
        """Within, the model has the average; after it, bit for bit what it had before."""

    def state(self) -> dict[str, torch.Tensor]:
        """Return a copy on the CPU by "<parameter name>/ema", beside the optimizer's moments."""

    def load_state(self, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Continue from a state, and return the entries of it that are none of `state`.

        Raises:
            UserError: If an average is missing.
        """


def build_averages(
    ema_decay: float | None,
    *,
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
) -> Averages:
    """Return the averages of a run; those of most runs are the weights themselves."""
    # Only a schedule-free optimizer has this mode.
    if "train_mode" in optimizer.param_groups[0]:
        return ScheduleFreeAverages(optimizer, parameters)
    if ema_decay is not None:
        return MovingAverages(parameters, decay=ema_decay)
    return NoAverages()


class NoAverages:
    """The weights themselves."""

    def after_step(self, step: int) -> None:
        """Do nothing."""

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Change nothing."""
        yield

    def state(self) -> dict[str, torch.Tensor]:
        """Return nothing: there is nothing to keep."""
        return {}

    def load_state(self, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the state as it is."""
        return dict(state)


class MovingAverages:
    """The exponential moving average of trained weights.

    After step t, with the decay d::

        average = c * average + (1 - c) * weight        c = min(d, (1 + t) / (10 + t))

    The smaller c of the first steps keeps the start, at which B is zero, from outweighing what a
    short run learns.

    Args:
        parameters: Trained weights by name.
        decay: Share of the average that is kept at each step, in the long run.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], *, decay: float) -> None:
        self._parameters = parameters
        self._decay = decay
        self._averages = {name: p.detach().clone() for name, p in parameters.items()}

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Take in the weights after a step."""
        kept = min(self._decay, (1 + step) / (10 + step))
        weights = [parameter.detach() for parameter in self._parameters.values()]
        torch._foreach_lerp_(list(self._averages.values()), weights, 1 - kept)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within, the weights are the averages."""
        with _kept(self._parameters):
            for name, parameter in self._parameters.items():
                parameter.data.copy_(self._averages[name])
            yield

    def state(self) -> dict[str, torch.Tensor]:
        """Return the averages."""
        return {
            f"{name}/{_MOMENT}": average.to("cpu", copy=True).contiguous()
            for name, average in self._averages.items()
        }

    def load_state(self, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Continue from averages.

        Raises:
            UserError: If one is missing.
        """
        names = {f"{name}/{_MOMENT}": name for name in self._averages}
        missing = sorted(names.keys() - state.keys())
        if missing:
            raise UserError(
                Problem(
                    id="checkpoint.average",
                    message="The checkpoint must hold the average of every trained tensor, but "
                    f'lacks "{missing[0]}" ({len(missing)} such).',
                    key="trainer.ema_decay",
                    fix="resume with the configuration that wrote the checkpoint",
                )
            )
        for key, name in names.items():
            self._averages[name].copy_(state[key])
        return {key: value for key, value in state.items() if key not in names}


class ScheduleFreeAverages(NoAverages):
    """The average that a schedule-free optimizer computes by itself.

    The weights in training are a mix of it and of the optimizer's own sequence, from which it is
    computed when it is needed (Defazio et al. 2024, arXiv:2405.15682, equation 3).

    Args:
        optimizer: Of the schedulefree package.
        parameters: Trained weights by name.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]
    ) -> None:
        self._optimizer: Any = optimizer
        self._parameters = parameters

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within, the weights are the averages.

        The way back that the optimizer offers would round, so the weights are kept.
        """
        modes = [group["train_mode"] for group in self._optimizer.param_groups]
        with _kept(self._parameters):
            self._optimizer.eval()
            try:
                yield
            finally:
                for group, mode in zip(self._optimizer.param_groups, modes, strict=True):
                    group["train_mode"] = mode


@contextmanager
def _kept(parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Put the weights back at the end."""
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    try:
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.data.copy_(before[name])

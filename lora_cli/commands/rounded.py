"""Comparing an export whose numbers are coarser: how far it is, and whether that is rounding."""

import math
from dataclasses import dataclass
from typing import Any

import torch

from lora_cli.artifacts.exporters.contract import Noise
from lora_cli.commands.merging import (
    TOLERANCE,
    Comparison,
    Probe,
    compare_outputs,
    outputs_of,
    with_metrics,
)
from lora_cli.errors import Problem, RunFailedError
from lora_cli.training.runtime import default_device

# Random moves are tried so often; the format itself, which rounds to the nearest, is one more such
# move. The largest of its differences may by chance be several times larger, their mean may not.
_TRIES = 2
_FACTOR = 4.0
_MEAN_FACTOR = 2.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Rounded:
    """How far a coarser form of an adapter is from it.

    Attributes:
        comparison: On the rows of the probe.
        bound: The largest difference that its format explains.
        mean_bound: The largest mean that its format explains.
    """

    comparison: Comparison
    bound: float
    mean_bound: float

    @property
    def text(self) -> str:
        """The comparison in one line."""
        return (
            f"{self.comparison.text}; rounding explains differences of {self.bound:.2e}, and of "
            f"{self.mean_bound:.2e} on average"
        )

    def as_json(self) -> dict[str, Any]:
        """Return the numbers by name."""
        return {
            **self.comparison.as_json(),
            "bound": self.bound,
            "mean_bound": self.mean_bound,
        }


def check_rounded(
    probe: Probe, written: Any, model: Any, noise: Noise, *, seed: int = 0
) -> Rounded:
    """Compare an export with the adapter, and with what rounding to its format does to the model.

    Args:
        probe: What the adapter says.
        written: The export, loaded in its runtime.
        model: The merged model; it is as it was afterwards.
        noise: That of the format.
        seed: Decides the noise.

    Raises:
        RunFailedError: If the export is farther off than rounding explains.
    """
    outputs = outputs_of(probe, written)
    found = compare_outputs(probe, outputs)
    moved, moved_mean = _moved_by(probe, model.to(default_device()), noise, seed=seed)
    plain = TOLERANCE.get(model.dtype, TOLERANCE[torch.float32]) * max(1.0, found.max_abs_value)
    result = Rounded(
        comparison=with_metrics(found, probe, outputs, what="exported"),
        bound=plain + _FACTOR * moved,
        mean_bound=plain + _MEAN_FACTOR * moved_mean,
    )
    is_near = (
        found.max_abs_difference <= result.bound and found.mean_abs_difference <= result.mean_bound
    )
    if not is_near or not math.isfinite(result.bound):
        raise RunFailedError(
            Problem(
                id="export.differs",
                message="The exported model must be as near to the adapter as its number format "
                f"allows, but is not on {result.text}.",
                allowed=f"a difference of at most {result.bound:.2g}, and of "
                f"{result.mean_bound:.2g} on average",
                fix="nothing was written; report this with the model that you use",
            )
        )
    return result


def _moved_by(probe: Probe, model: Any, noise: Noise, *, seed: int) -> tuple[float, float]:
    """Return the largest difference that the noise of a format has made, and the largest mean."""
    largest, mean = 0.0, 0.0
    for number in range(_TRIES):
        generator = torch.Generator().manual_seed(seed + number)
        with noise(model, generator):
            outputs = outputs_of(probe, model)
        found = compare_outputs(probe, outputs)
        largest = max(largest, found.max_abs_difference)
        mean = max(mean, found.mean_abs_difference)
    return largest, mean

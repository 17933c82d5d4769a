"""Comparing an export whose numbers are coarser: how far it is, and whether that is rounding."""

import math
from collections.abc import Mapping, Sequence
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
)
from lora_cli.errors import Problem, RunFailedError
from lora_cli.training.runtime import default_device

# Random moves are tried so often; the format itself, which rounds to the nearest, is one more such
# move, and may by chance be the largest of several by some factor, but not by this one.
_TRIES = 2
_FACTOR = 4.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Rounded:
    """How far a coarser form of an adapter is from it.

    Attributes:
        comparison: On the rows of the probe.
        bound: The largest difference that its format explains.
        metrics: Of the adapter and of the exported form, on the same rows.
        main: The metric that the task is judged by.
    """

    comparison: Comparison
    bound: float
    metrics: Mapping[str, Mapping[str, float]]
    main: str

    @property
    def text(self) -> str:
        """The comparison in one line."""
        before, after = (self.metrics[name].get(self.main) for name in ("adapter", "exported"))
        said = f"{self.comparison.text}; rounding explains up to {self.bound:.2e}"
        if before is None or after is None:
            return said
        return f"{said}; {self.main} {before:.4f} before, {after:.4f} after"

    def as_json(self) -> dict[str, Any]:
        """Return the numbers by name."""
        return {**self.comparison.as_json(), "bound": self.bound, "metrics": self.metrics}


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
    moved = _moved_by(probe, model.to(default_device()), noise, seed=seed)
    size = max(1.0, found.max_abs_value)
    bound = TOLERANCE.get(model.dtype, TOLERANCE[torch.float32]) * size + _FACTOR * moved
    metrics = {"adapter": _metrics(probe, probe.outputs), "exported": _metrics(probe, outputs)}
    result = Rounded(comparison=found, bound=bound, metrics=metrics, main=probe.task.metric)
    if not math.isfinite(bound) or found.max_abs_difference > bound:
        raise RunFailedError(
            Problem(
                id="export.differs",
                message="The exported model must be as near to the adapter as its number format "
                f"allows, but is not on {result.text}.",
                allowed=f"a difference of at most {bound:.2g}",
                fix="nothing was written; report this with the model that you use",
            )
        )
    return result


def _moved_by(probe: Probe, model: Any, noise: Noise, *, seed: int) -> float:
    """Return the largest difference that the noise of a format has made."""
    largest = 0.0
    for number in range(_TRIES):
        generator = torch.Generator().manual_seed(seed + number)
        with noise(model, generator):
            found = compare_outputs(probe, outputs_of(probe, model))
        largest = max(largest, found.max_abs_difference)
    return largest


def _metrics(probe: Probe, outputs: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, float]:
    task = probe.task
    predictions = [
        prediction
        for found, batch in zip(outputs, probe.batches, strict=True)
        for prediction in task.decode(found, batch)
    ]
    return task.metrics(predictions)

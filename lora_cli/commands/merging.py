"""Merging an adapter, and proving on real rows that nothing was lost; for merge and export."""

import math
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from lora_cli.commands.display import Display
from lora_cli.commands.opening import Opened
from lora_cli.config.tasks import DataConfig
from lora_cli.errors import Problem, RunFailedError
from lora_cli.lora.strategies import check_mergeable
from lora_cli.models.base import BaseModel
from lora_cli.tasks.contract import Batch, Features, Task
from lora_cli.training.evaluation import evaluating
from lora_cli.training.runtime import device_of, move_to

# Largest difference that rounding explains, for outputs of size one, by the dtype of the base:
# below float32 the merged weights are rounded once more than the adapter's. Rows whose best labels
# are nearer than that may change places, so the agreement of decisions is shown but not asked for.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-2, torch.bfloat16: 2e-1}
_COMMANDS = {"merged": "merge", "exported": "export"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Probe:
    """Some real rows, and what the adapter says about them.

    Attributes:
        task: Runs them.
        batches: The rows, in batches.
        outputs: The adapter's output tensors by name, one dict a batch.
        split: Where the rows are from.
        rows: Number of rows.
        example: What the task gave the model for the first batch, by name, on the CPU, if known.
    """

    task: Task
    batches: Sequence[Batch]
    outputs: Sequence[Mapping[str, torch.Tensor]]
    split: str
    rows: int
    example: Mapping[str, torch.Tensor] | None = None


@dataclass(frozen=True, slots=True)
class Comparison:
    """How far two models are apart on the rows of a probe.

    Attributes:
        rows: Rows compared.
        max_abs_difference: Largest difference of any output value.
        mean_abs_difference: Mean difference of all output values, without sign.
        max_abs_value: Largest output value of the adapter, without its sign.
        agreement: Share of output vectors whose largest value is at the same place.
        metrics: Of the adapter and of the other form, as far as they are numbers.
        main: The metric that the task is judged by.
    """

    rows: int
    max_abs_difference: float
    mean_abs_difference: float
    max_abs_value: float
    agreement: float
    metrics: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    main: str = ""

    @property
    def text(self) -> str:
        """The comparison in one line."""
        said = (
            f"{self.rows} rows: largest difference {self.max_abs_difference:.2e}, "
            f"mean {self.mean_abs_difference:.2e}, same decision in {100 * self.agreement:.2f} %"
        )
        values = [found[self.main] for found in self.metrics.values() if self.main in found]
        if len(values) < 2:
            return said
        return f"{said}; {self.main} {values[0]:.4f} before, {values[1]:.4f} after"

    def as_json(self) -> dict[str, Any]:
        """Return the numbers by name."""
        return {
            "rows": self.rows,
            "max_abs_difference": self.max_abs_difference,
            "mean_abs_difference": self.mean_abs_difference,
            "agreement": self.agreement,
            "metrics": self.metrics,
        }


def merge_with_probe(
    opened: Opened, data: DataConfig, *, check_rows: int
) -> tuple[Any, Probe | None]:
    """Return the merged model, and what the adapter said before on `check_rows` rows.

    The rows come from the validation split where there is one. With `check_rows` 0 there is no
    probe.

    Raises:
        UserError: If the adapter is one that cannot be merged.
    """
    folder = shlex.quote(str(opened.subject.adapter))
    check_mergeable(
        opened.config.strategy.name,
        key="from",
        fix=f"lora-cli predict {folder} text=TEXT runs it as it is",
    )
    if check_rows == 0:
        model: Any = opened.attach()
        opened.merge()
        return model, None
    model, probe = _attach_with_probe(opened, data, check_rows=check_rows)
    opened.merge()
    return model, probe


def outputs_before(
    opened: Opened, data: DataConfig, *, check_rows: int
) -> tuple[Opened, Probe, torch.dtype]:
    """Return what an adapter says, and the adapter without its model, whose memory is free then.

    The third value is the number format that the model was in.
    """
    model, probe = _attach_with_probe(opened, data, check_rows=check_rows)
    dtype: torch.dtype = model.dtype
    return replace(opened, base=BaseModel(None, opened.base.new_keys)), probe, dtype


def rows_to_compare(
    opened: Opened, data: DataConfig, *, check_rows: int | None = None
) -> tuple[str, Task, list[Features]]:
    """Return the split, the task and the encoded rows that two models are compared on.

    These are the first of the split, or all of them where no number is given.
    """
    splits, task = opened.load_splits(data)
    split = "validation" if "validation" in splits.rows else next(iter(splits.rows))
    rows = splits.rows[split][:check_rows]
    encoded = (task.encode(row) for row in rows)
    return split, task, [row for row in encoded if not row.get("left_out")]


def _attach_with_probe(opened: Opened, data: DataConfig, *, check_rows: int) -> tuple[Any, Probe]:
    split, task, features = rows_to_compare(opened, data, check_rows=check_rows)
    model: Any = opened.attach()
    return model, take_probe(task, model, features, split=split)


def take_probe(task: Task, model: nn.Module, features: Sequence[Features], *, split: str) -> Probe:
    """Return what the adapter, which is in `model`, says about some rows."""
    parts = [features[start : start + 16] for start in range(0, len(features), 16)]
    # What a model writes differs much where two tokens are as probable: rounding decides.
    batches = [{**task.collate(part), "generate": False} for part in parts]
    with _first_inputs(model) as example:
        outputs = _run(task, model, batches)
    return Probe(
        task=task,
        batches=batches,
        outputs=outputs,
        split=split,
        rows=len(features),
        example=example,
    )


@contextmanager
def _first_inputs(model: nn.Module) -> Iterator[dict[str, torch.Tensor]]:
    """Give a dict that the first call of a model fills with the tensors that it is given."""
    example: dict[str, torch.Tensor] = {}

    def keep(_: nn.Module, args: Any, given: Mapping[str, Any]) -> None:
        del args
        if not example:
            tensors = {name: x for name, x in given.items() if isinstance(x, torch.Tensor)}
            example.update({name: tensor.cpu() for name, tensor in tensors.items()})

    handle = model.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        yield example
    finally:
        handle.remove()


def check_same(
    probe: Probe, model: Callable[..., Any], dtype: torch.dtype, *, what: str
) -> Comparison:
    """Compare another form of the adapter with the adapter, on the rows of the probe.

    Args:
        probe: What the adapter says.
        model: The other form, which is not yet where it was asked for.
        dtype: Number format of its weights.
        what: "merged" or "exported", for the error.

    Raises:
        RunFailedError: If they are further apart than rounding to `dtype` explains.
    """
    outputs = outputs_of(probe, model)
    comparison = compare_outputs(probe, outputs)
    tolerance = _tolerance(comparison, dtype)
    if comparison.max_abs_difference <= tolerance:
        return with_metrics(comparison, probe, outputs, what=what)
    raise RunFailedError(
        Problem(
            id=f"{_COMMANDS[what]}.differs",
            message=f"The {what} model must say what the adapter says, but does not on "
            f"{comparison.text}.",
            allowed=f"a difference of at most {tolerance:.2g}",
            fix="nothing was written; report this with the model that you use",
        )
    )


def show_same(
    probe: Probe, model: Any, display: Display, *, dtype: torch.dtype | None = None
) -> Comparison:
    """Compare a merged model with the adapter, and tell the result; raises as `check_same`.

    Args:
        probe: What the adapter says.
        model: The merged model.
        display: Told the result.
        dtype: Number format of the base that the adapter was in, if it may be another.
    """
    formats = [model.dtype, dtype or model.dtype]
    coarser = max(formats, key=lambda kind: TOLERANCE.get(kind, TOLERANCE[torch.float32]))
    found = check_same(probe, model, coarser, what="merged")
    display.note(f"merged against adapter on {probe.split}: {found.text}")
    return found


def compare(
    probe: Probe, model: Callable[..., Any], dtype: torch.dtype
) -> tuple[Comparison, float]:
    """Return how far `model` is from the adapter, and how far rounding to `dtype` may bring it.

    The second is below every difference where the adapter's outputs are no numbers.
    """
    comparison = compare_outputs(probe, outputs_of(probe, model))
    return comparison, _tolerance(comparison, dtype)


def _tolerance(comparison: Comparison, dtype: torch.dtype) -> float:
    size = max(1, comparison.max_abs_value)
    tolerance = TOLERANCE.get(dtype, TOLERANCE[torch.float32]) * size
    return tolerance if math.isfinite(tolerance) else -1.0


def outputs_of(probe: Probe, model: Callable[..., Any]) -> list[Mapping[str, torch.Tensor]]:
    """Return what another form of the adapter says about the rows of the probe."""
    return _run(probe.task, model, probe.batches)


def compare_outputs(probe: Probe, outputs: Sequence[Mapping[str, torch.Tensor]]) -> Comparison:
    """Return how far outputs on the rows of the probe are from the adapter's."""
    largest, total, count, size, same, vectors = 0.0, 0.0, 0, 0.0, 0, 0
    for expected, found in zip(probe.outputs, outputs, strict=True):
        for name, value in expected.items():
            difference = (value.float() - found[name].float().to(value.device)).abs()
            # `max` would pass over a NaN.
            largest = max(largest, float(difference.max().nan_to_num(nan=torch.inf)))
            total, count = total + float(difference.double().sum()), count + difference.numel()
            size = max(size, float(value.abs().max()))
            agree = value.argmax(-1).cpu() == found[name].argmax(-1).cpu()
            same, vectors = same + int(agree.sum()), vectors + agree.numel()
    return Comparison(probe.rows, largest, total / count, size, same / vectors)


def with_metrics(
    comparison: Comparison,
    probe: Probe,
    outputs: Sequence[Mapping[str, torch.Tensor]],
    *,
    what: str,
) -> Comparison:
    """Return a comparison with the task's metrics of both, the other form's under `what`."""
    metrics = {"adapter": _metrics(probe, probe.outputs), what: _metrics(probe, outputs)}
    return replace(comparison, metrics=metrics, main=probe.task.metric)


def _metrics(probe: Probe, outputs: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, float]:
    predictions = [
        prediction
        for found, batch in zip(outputs, probe.batches, strict=True)
        for prediction in probe.task.decode({name: x.cpu() for name, x in found.items()}, batch)
    ]
    metrics = probe.task.metrics(predictions)
    return {name: value for name, value in metrics.items() if math.isfinite(value)}


def _run(
    task: Task, model: Callable[..., Any], batches: Sequence[Batch]
) -> list[Mapping[str, torch.Tensor]]:
    with evaluating(model), torch.inference_mode():
        device = device_of(model)
        return [task.forward(model, move_to(batch, device)).outputs for batch in batches]

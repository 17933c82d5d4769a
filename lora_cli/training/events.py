"""What the training loop tells the rest of the program, as plain values.

The checkpointer, the metrics file and the progress display are listeners: functions that take one
event. A listener never gets the trainer, so it cannot change the run.
"""

from __future__ import annotations  # so that showing a run does not have to load torch

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a run stands; everything that resuming needs besides tensors.

    Attributes:
        step: Optimizer steps done.
        samples: Rows consumed since the start, over all processes; the position in the order.
        best_metric: Best value of the selecting metric so far, or None before an evaluation.
        best_step: Step that reached it.
        best_sha256: What `tensors_sha256` says of the adapter of that step.
        evaluations_without_improvement: Count for early stopping.
        evaluation_due: Whether the evaluation at this step was broken off by a stop request.
        micro_batch_size: Rows of a micro-batch on each process, once memory has run out for more.
        eval_batch_size: The same for evaluation.
        loss_scale: What the loss is multiplied by in fp16.
        loss_scale_steps: Steps since that was changed last.
        loss_sum: Loss, summed over the supervised items of the steps since the last reported one.
        loss_count: Number of these items.
        seconds: Wall time so far over all sessions, evaluation included.
        train_seconds: Part of it that was spent in optimizer steps.
    """

    step: int = 0
    samples: int = 0
    best_metric: float | None = None
    best_step: int | None = None
    best_sha256: str | None = None
    evaluations_without_improvement: int = 0
    evaluation_due: bool = False
    micro_batch_size: int | None = None
    eval_batch_size: int | None = None
    loss_scale: float | None = None
    loss_scale_steps: int = 0
    loss_sum: float = 0.0
    loss_count: float = 0.0
    # Equal runs take different times.
    seconds: float = field(default=0.0, compare=False)
    train_seconds: float = field(default=0.0, compare=False)


@dataclass(frozen=True, slots=True)
class TrainState:
    """A checkpoint in memory.

    Attributes:
        progress: Position and best metric.
        adapter: Trained tensors by name.
        optimizer: Moments by "<parameter name>/<moment name>", averages of weights among them.
        method: State of what the adapters' variant does at each step; empty where it does nothing.
    """

    progress: Progress
    adapter: Mapping[str, torch.Tensor]
    optimizer: Mapping[str, torch.Tensor]
    method: Mapping[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RunStarted:
    """Training is about to begin.

    Attributes:
        first_step: Steps done already; above 0 when the run resumes.
        total_steps: Optimizer steps of the whole run.
        steps_per_epoch: Optimizer steps of one pass over the rows.
        train_rows: Rows of one pass.
    """

    first_step: int
    total_steps: int
    steps_per_epoch: int
    train_rows: int


@dataclass(frozen=True, slots=True)
class StepDone:
    """One optimizer step, sent every step; `log` marks those that `trainer.log_steps` reports.

    Attributes:
        step: Optimizer steps done.
        epoch: Passes over the rows done, as a fraction.
        loss: Mean loss per supervised item since the last reported step.
        lr: Learning rate of this step.
        grad_norm: Length of the gradient before clipping.
        samples_per_second: Rows per second since the last reported step, evaluation excluded.
        log: Whether `trainer.log_steps` asks to report this step.
        ids: Of the rows of this step over all processes, in the order of the run.
    """

    step: int
    epoch: float
    loss: float
    lr: float
    grad_norm: float
    samples_per_second: float
    log: bool
    ids: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class BatchHalved:
    """Rows did not fit into memory, so that fewer are taken at once from here on.

    Attributes:
        step: Optimizer steps done.
        kind: "train" or "eval".
        rows: Rows in memory at once on each process, from here on.
    """

    step: int
    kind: str
    rows: int


@dataclass(frozen=True, slots=True)
class EvalStarted:
    """An evaluation begins.

    Attributes:
        step: Optimizer steps done.
        rows: Rows to evaluate.
    """

    step: int
    rows: int


@dataclass(frozen=True, slots=True)
class EvalProgress:
    """Some more rows are evaluated.

    Attributes:
        rows: Rows done so far.
    """

    rows: int


@dataclass(frozen=True, slots=True)
class EvalDone:
    """An evaluation has ended.

    Attributes:
        step: Optimizer steps done; 0 for the base model before training.
        metrics: Every metric by name, `loss` among them.
        metric: Name of the selecting metric.
        is_best: Whether this is the best value so far.
        adapter: Trained tensors by name, when `is_best`; empty otherwise.
    """

    step: int
    metrics: Mapping[str, float]
    metric: str
    is_best: bool
    adapter: Mapping[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class CheckpointDue:
    """The state should be saved now.

    Attributes:
        state: What to save.
    """

    state: TrainState


@dataclass(frozen=True, slots=True)
class RunEnded:
    """Training has ended.

    Attributes:
        step: Optimizer steps done.
        reason: "finished", "early stopping" or "stopped".
        seconds: Wall time over all sessions, evaluation included.
        samples_per_second: Rows trained per second over all sessions, evaluation excluded.
    """

    step: int
    reason: str
    seconds: float
    samples_per_second: float


Event = (
    RunStarted
    | StepDone
    | BatchHalved
    | EvalStarted
    | EvalProgress
    | EvalDone
    | CheckpointDue
    | RunEnded
)
Listener = Callable[[Event], None]

"""What a resumed run makes up for: the metrics of its start, and the best adapter, where lost."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lora_cli.artifacts.adapter import load_adapter
from lora_cli.artifacts.checkpoint import checkpoint_path, read_checkpoint
from lora_cli.artifacts.commit import DamagedFolderError, remove_folder
from lora_cli.artifacts.run_dir import MetricsFile, read_metrics
from lora_cli.commands.continuing import load_start
from lora_cli.commands.finishing import first_metrics
from lora_cli.commands.phases import shift_state
from lora_cli.commands.preparing import Prepared
from lora_cli.commands.sharing import share_state
from lora_cli.errors import Problem, UserError
from lora_cli.log import logger
from lora_cli.lora.prefix import without_prefix
from lora_cli.lora.state import load_adapter_state
from lora_cli.training.events import EvalDone, TrainState
from lora_cli.training.loop import Trainer

Metrics = Mapping[str, float]

_ABANDONED = "it was of steps that this run has abandoned"


def metrics_of_start(
    path: Path, trainer: Trainer, prepared: Prepared, metrics: MetricsFile | None
) -> tuple[Metrics, Metrics]:
    """Return the metrics of the base model, and of the adapter that a run started from.

    What metrics.jsonl has lost is measured again and written there, with a warning.

    Args:
        path: The run directory.
        trainer: Of the model as it is before anything trained is loaded.
        prepared: The model.
        metrics: The file, in the process that writes it.

    Raises:
        EvaluationStopped: If a stop is requested meanwhile.
    """
    lines = trainer.runtime.group.first(lambda: read_metrics(path / "metrics.jsonl"))
    # Those of a later step are of another adapter.
    lines = [line for line in lines if line["step"] == 0]
    start = first_metrics(lines, "eval")
    if start:
        return first_metrics(lines, "base") or start, start
    if metrics is not None:
        logger.warning(
            "warning: %s has lost how the run began: that is measured again, and the curves "
            "of the report lack it",
            path / "metrics.jsonl",
        )
    with without_prefix(prepared.model):
        base = trainer.evaluate().metrics(prepared.task)
    if prepared.start is not None and not prepared.start.is_merged:
        load_start(prepared.start, prepared.model, prepared.saved, same_head=prepared.same_head)
    start = trainer.evaluate().metrics(prepared.task)
    with trainer.runtime.group.together():
        if metrics is not None:
            metrics.base(base)
            metrics(EvalDone(step=0, metrics=start, metric=prepared.task.metric, is_best=False))
    return base, start


def repair_best(
    path: Path,
    trainer: Trainer,
    prepared: Prepared,
    state: TrainState,
    *,
    facts: Mapping[str, Any],
    before: int,
    save: Callable[[Mapping[str, torch.Tensor], Metrics], Any],
) -> TrainState:
    """Write the best adapter of a run again where it is missing, damaged, or of abandoned steps.

    Where nothing was the best yet, an adapter of abandoned steps is removed.

    The trainer and its model are left at the checkpoint of the best step.

    Args:
        path: The run directory.
        trainer: Of the run.
        prepared: The model.
        state: What the run goes on from.
        facts: Entries of the manifests of the run.
        before: Optimizer steps of the phase before this one.
        save: Writes an adapter with its metrics.

    Returns:
        What the run goes on from, for the caller to load: `state`, but without a best step where
        the adapter is of abandoned steps and no checkpoint has the run's own.

    Raises:
        UserError: If there is no adapter, and no checkpoint of the best step.
    """
    group, step = trainer.runtime.group, state.progress.best_step
    expected = state.progress.best_sha256 if step is not None and step > before else None
    why = group.first(lambda: _why_unusable(path / "adapter", expected, is_any=step is not None))
    if why is None:
        return state
    if step is None:
        with group.together():
            if group.is_first:
                remove_folder(path / "adapter")
        return state
    best_state = partial(_best_state, path, state, facts=facts, why=why, before=before)
    try:
        best = share_state(group, best_state)
    except UserError:
        if why != _ABANDONED:
            raise
        return _without_best(state, tell=group.is_first)
    if best is None:
        raise RuntimeError("The checkpoint of the best step has no state")
    load_adapter_state(prepared.model, dict(best.adapter), prepared.saved)
    trainer.resume(shift_state(best, -before))
    known = {prepared.task.metric: state.progress.best_metric or 0.0}
    with group.together():
        save(trainer.averaged_adapter(), _metrics_of(path, step) or known)
    if group.is_first:
        text = "warning: the best adapter was written again from the checkpoint of step %d: %s"
        logger.warning(text, step, why)
    return state


def _metrics_of(path: Path, step: int) -> Metrics:
    """Return what metrics.jsonl says of a step; nothing if that is lost."""
    lines = read_metrics(path / "metrics.jsonl")
    return first_metrics([line for line in lines if line["step"] == step], "eval")


def _without_best(state: TrainState, *, tell: bool) -> TrainState:
    """Return the state of a run whose best step is in no checkpoint any more."""
    if tell:
        logger.warning(
            "warning: the best adapter, of step %d, is in no checkpoint any more, and adapter/ is "
            "of later steps: the next evaluation counts as the best until a better one",
            state.progress.best_step,
        )
    progress = replace(state.progress, best_metric=None, best_step=None, best_sha256=None)
    return replace(state, progress=progress)


def _why_unusable(folder: Path, expected: str | None, *, is_any: bool) -> str | None:
    """Say why an adapter cannot be the best of a run, or that there should be none.

    Args:
        folder: The adapter.
        expected: Its hash; None where that is not known.
        is_any: Whether the run has a best adapter.
    """
    if not is_any:
        return "it is of abandoned steps" if folder.exists() else None
    try:
        _, record = load_adapter(folder)
    except UserError as error:
        return str(error)
    if None in (expected, record.tensors_sha256) or expected == record.tensors_sha256:
        return None
    return _ABANDONED


def _best_state(
    path: Path, state: TrainState, *, facts: Mapping[str, Any], why: str, before: int
) -> TrainState:
    step = state.progress.best_step or 0
    if step == state.progress.step:
        return state
    place = checkpoint_path(path / "checkpoints", step)
    try:
        # That of the phase before holds the adapter, and not every weight.
        if step <= before:
            raise DamagedFolderError(f"step {step} is of the phase before")
        return read_checkpoint(place, facts=facts)[0]
    except DamagedFolderError as error:
        raise UserError(
            Problem(
                id="resume.lost-adapter",
                message=f"The best adapter must be in the run directory or in {place.name}, but "
                f"is in neither: {why} {error}.",
                where=str(path),
                fix="put a copy of adapter/ back, name a checkpoint from before that step with "
                "trainer.resume=PATH, or start anew with --overwrite",
            )
        ) from None

"""One run, in one process or several: files around the training loop."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from lora_cli.artifacts.adapter import MERGED_BASE, load_adapter
from lora_cli.artifacts.checkpoint import Checkpointer
from lora_cli.artifacts.row_log import RowLog
from lora_cli.artifacts.run_dir import MetricsFile, clear_run_dir, write_json
from lora_cli.commands.building import base_record, build_plan
from lora_cli.commands.continuing import load_start
from lora_cli.commands.display import Display
from lora_cli.commands.finishing import (
    compared_forms,
    describe_result,
    evaluate_merged,
    show_result,
)
from lora_cli.commands.merged_base import install_base
from lora_cli.commands.phases import (
    FirstPhase,
    merged_state,
    prepare_full,
    put_aside,
    read_first_phase,
    second_phase,
    shift_state,
    shifted,
    write_first_phase,
)
from lora_cli.commands.preparing import Prepared
from lora_cli.commands.repairing import metrics_of_start, repair_best
from lora_cli.commands.restoring import expected_bytes, restore, run_facts
from lora_cli.commands.resuming import how_stopped
from lora_cli.commands.saving import (
    live_state,
    save_description,
    save_trained,
    write_findings,
)
from lora_cli.commands.sharing import check_shared_base, share_first_phase, share_state
from lora_cli.commands.stopping import StopRequest
from lora_cli.config.commands import TrainConfig
from lora_cli.config.composed import Composed
from lora_cli.config.strategies import LoraThenFullStrategyConfig
from lora_cli.lora.method import build_method
from lora_cli.lora.prefix import without_prefix
from lora_cli.lora.state import load_adapter_state
from lora_cli.lora.strategies import why_unmergeable
from lora_cli.ranks import log_into
from lora_cli.training.evaluation import EvaluationStopped
from lora_cli.training.events import EvalDone, Event, Listener, RunEnded, TrainState
from lora_cli.training.loop import Trainer
from lora_cli.training.runtime import Runtime

_STOPPED = "stopped"


class Session:
    """One run: files around the training loop.

    Of several processes the first alone touches the run directory; the others are told what it has
    read, and learn of it when it cannot write.
    """

    def __init__(
        self,
        path: Path,
        composed: Composed,
        prepared: Prepared,
        runtime: Runtime,
        display: Display,
        *,
        stop: StopRequest,
        observe: Listener,
    ) -> None:
        self._path = path
        self._composed = composed
        self._config: TrainConfig = composed.config
        self._prepared = prepared
        self._runtime = runtime
        self._group = runtime.group
        self._display = display
        self._stop = stop
        self._observe = observe
        self._facts: Mapping[str, Any] = {}
        # Metrics of the base model, and of the adapter that the run starts from.
        self._base_metrics: Mapping[str, float] = {}
        self._start_metrics: Mapping[str, float] = {}
        # How the first of two phases ended; None before that, and in a run of one phase.
        self._first: FirstPhase | None = None
        # Where this session began: step, and whether the evaluation there is done or not due.
        self._since = (0, True)
        # Written by the first process alone.
        self._metrics: MetricsFile | None = None

    def run(self, *, resume: bool, checkpoint: Path | None = None) -> int:
        """Write the description, train, evaluate, write the results.

        Args:
            resume: Whether the run has begun already.
            checkpoint: Where it goes on from; None takes the newest whole one.

        Raises:
            Interrupted: If interrupted with nothing saved.
            RunFailedError: If the time was up with nothing new saved.
            StoppedError: If stopped or interrupted with a checkpoint committed.
        """
        check_shared_base(self._runtime, self._prepared, self._config, self._display)
        self._facts = run_facts(
            self._path, self._composed, self._prepared, world_size=self._group.size, resume=resume
        )
        state = share_state(
            self._group,
            lambda: restore(self._path, checkpoint, facts=self._facts) if resume else None,
        )
        with self._group.together():
            if self._group.is_first:
                self._describe(resume=resume)
        if self._merges_start():
            source = replace(self._prepared.source, folder=self._path / MERGED_BASE)
            self._prepared = replace(self._prepared, source=source)
        log_into(self._path / "logs")
        try:
            with self._stop.deferring():
                return self._train(state)
        except EvaluationStopped:
            # All processes are here; a second Ctrl-C waits for none of them.
            self._stop.timed_out = self._group.any(self._stop.timed_out)
            raise how_stopped(self._stop, self._path, since=self._since) from None
        except KeyboardInterrupt:
            raise how_stopped(self._stop, self._path, since=self._since) from None

    def _describe(self, *, resume: bool) -> None:
        if not resume:
            clear_run_dir(self._path)
        if self._merges_start():
            install_base(self._prepared.source, self._path)
        device = str(self._runtime.device)
        run = self._facts["run_id"]
        save_description(self._path, self._composed, device=device, base=self._base(), run=run)

    def _merges_start(self) -> bool:
        return self._prepared.start is not None and self._prepared.start.is_merged

    def _train(self, state: TrainState | None) -> int:
        last_step = -1 if state is None else state.progress.step
        if state is not None:
            self._since = (last_step, not state.progress.evaluation_due)
        with self._group.together():
            if self._group.is_first:
                self._metrics = MetricsFile(self._path / "metrics.jsonl", last_step=last_step)
        has_two = isinstance(self._config.strategy, LoraThenFullStrategyConfig)
        if has_two and state is not None:
            first = share_first_phase(self._group, lambda: read_first_phase(self._path))
            if first is not None and state.progress.step > first.steps:
                self._enter_full(first, None)
        trainer = self._trainer()
        if state is None:
            self._begin(trainer)
        else:
            self._resume(trainer, state)
        ended = self._run_phase(trainer)
        if has_two and self._first is None and ended.reason != _STOPPED:
            trainer = self._begin_full(trainer, ended)
            ended = self._run_phase(trainer)
        if ended.reason == _STOPPED:
            self._stopped(trainer, ended)
        return self._finish(trainer, ended)

    @property
    def _before(self) -> int:
        """Optimizer steps of the phase before this one."""
        return 0 if self._first is None else self._first.steps

    def _run_phase(self, trainer: Trainer) -> RunEnded:
        ended = trainer.run()
        return replace(ended, step=ended.step + self._before)

    def _trainer(self) -> Trainer:
        prepared, config = self._prepared, self._config
        plan = build_plan(prepared, config, is_second=self._first is not None)
        checkpointer = Checkpointer(
            self._path / "checkpoints",
            keep=config.trainer.keep_checkpoints,
            facts=self._facts,
            expected_bytes=expected_bytes(prepared.model),
        )
        rows = RowLog(self._path, is_on=config.trainer.log_rows)
        saving = (rows, self._stop.timed(checkpointer)) if self._group.is_first else ()
        listeners = (self._record, self._keep_best, *saving, self._display.on_event, self._observe)
        return Trainer(
            task=prepared.task,
            model=prepared.model,
            saved_modules=prepared.saved,
            plan=plan,
            runtime=self._runtime,
            method=build_method(prepared.model, prepared.settings),
            listeners=[
                shifted(listener, self._before, steps_per_epoch=plan.steps_per_epoch)
                for listener in listeners
            ],
            should_stop=self._stop,
        )

    def _begin(self, trainer: Trainer) -> None:
        """Measure the base where the start of the run is something else, and load the start."""
        prepared = self._prepared
        continues = prepared.start is not None and not prepared.start.is_merged
        has_prefix = prepared.applied is not None and prepared.applied.prefix is not None
        if continues or has_prefix:
            with without_prefix(prepared.model):
                self._base_metrics = trainer.evaluate().metrics(prepared.task)
            with self._group.together():
                if self._metrics is not None:
                    self._metrics.base(self._base_metrics)
        if continues and prepared.start is not None:
            load_start(prepared.start, prepared.model, prepared.saved, same_head=prepared.same_head)

    def _resume(self, trainer: Trainer, state: TrainState) -> None:
        prepared, path, before = self._prepared, self._path, self._before
        found = metrics_of_start(path, trainer, prepared, self._metrics)
        self._base_metrics, self._start_metrics = found
        again, facts = self._save_adapter, self._facts
        state = repair_best(path, trainer, prepared, state, facts=facts, before=before, save=again)
        load_adapter_state(prepared.model, dict(state.adapter), prepared.saved)
        trainer.resume(shift_state(state, -before))
        self._display.note(f"resuming after step {state.progress.step}")

    def _record(self, event: Event) -> None:
        """Listener: metrics.jsonl, without the second look at what the first phase has made."""
        again = isinstance(event, EvalDone) and 0 < event.step == self._before
        if self._metrics is not None and not again:
            self._metrics(event)

    def _keep_best(self, event: Event) -> None:
        """Listener: keep the base's metrics, and write the adapter whenever it is the best."""
        if isinstance(event, EvalDone) and event.step == 0:
            self._start_metrics = event.metrics
            self._base_metrics = self._base_metrics or event.metrics
        if isinstance(event, EvalDone) and event.is_best:
            self._save_adapter(event.adapter, event.metrics)

    def _begin_full(self, trainer: Trainer, ended: RunEnded) -> Trainer:
        """Put the best adapter of the first phase aside, and make a trainer of every weight."""
        names = self._prepared.module_names
        metrics = self._group.first(
            lambda: dict(put_aside(self._path, module_names=names)[1].metrics["adapter"])
        )
        first = FirstPhase(
            steps=ended.step,
            reason=ended.reason,
            progress=asdict(trainer.progress),
            metrics=metrics,
        )
        state = self._group.first_tensors(
            lambda: live_state(self._prepared, put_aside(self._path, module_names=names)[0])
        )
        self._enter_full(first, merged_state(self._prepared, state))
        trainer = self._trainer()
        trainer.progress = first.begin()
        with self._group.together():
            if self._group.is_first:
                write_first_phase(self._path, first)
            self._save_adapter(trainer.adapter(), first.metrics)
        self._display.note(f"merged the adapter of {ended.step} steps; now every weight is trained")
        return trainer

    def _enter_full(self, first: FirstPhase, merged: Mapping[str, torch.Tensor] | None) -> None:
        self._first = first
        self._prepared = prepare_full(self._prepared, self._config, merged)
        self._config = second_phase(self._config)
        # A wrapper of the first model would keep it in memory.
        self._runtime = Runtime(
            precision=self._config.trainer.precision, timeout=self._config.distributed.timeout
        )

    def _save_adapter(
        self, tensors: Mapping[str, torch.Tensor], metrics: Mapping[str, float], sha256: str = ""
    ) -> int:
        """Write the adapter, and return its size; only the first process does."""
        if not self._group.is_first:
            return 0
        return save_trained(
            self._path,
            self._prepared,
            self._config,
            tensors,
            plain=self._composed.plain,
            base=self._base(),
            metrics={"base": dict(self._base_metrics), "adapter": dict(metrics)},
            sha256=sha256,
        )

    def _base(self) -> dict[str, Any]:
        return base_record(self._prepared, self._path)

    def _stopped(self, trainer: Trainer, ended: RunEnded) -> None:
        """Leave a usable adapter behind, and say how to go on.

        Raises:
            Interrupted: By a signal before the first step: there is nothing to continue.
            RunFailedError: If the time was up before anything was done.
            StoppedError: Otherwise.
        """
        self._stop.timed_out = self._group.any(self._stop.timed_out)
        at = (ended.step, not trainer.progress.evaluation_due)
        with self._group.together():
            if ended.step > 0 and not (self._path / "adapter").exists():
                self._save_adapter(trainer.averaged_adapter(), {})
        raise how_stopped(self._stop, self._path, at=at, since=self._since)

    def _finish(self, trainer: Trainer, ended: RunEnded) -> int:
        """Evaluate what was written, adapter and merged, and write result and report."""
        prepared, config = self._prepared, self._config
        state = self._group.first_tensors(
            lambda: live_state(prepared, load_adapter(self._path / "adapter")[0])
        )
        load_adapter_state(prepared.model, state, prepared.saved)
        then = "" if why_unmergeable(config.strategy.name) else ", then merged into the base"
        self._display.note(f"evaluating the saved adapter{then}")
        evaluation = trainer.evaluate()
        metrics = evaluation.metrics(prepared.task)
        with self._group.together():
            adapter_bytes = self._save_adapter(state, metrics, trainer.progress.best_sha256 or "")
        columns = compared_forms(
            prepared,
            self._first,
            base=self._base_metrics,
            start=self._start_metrics,
            adapter=metrics,
            merged=evaluate_merged(trainer, prepared, config, self._display),
        )
        result = {
            **describe_result(trainer, ended, columns, prepared, evaluation),
            "best_step": (trainer.progress.best_step or 0) + self._before,
            "adapter_bytes": adapter_bytes,
            **({} if self._first is None else self._first.as_json(ended)),
        }
        with self._group.together():
            if self._group.is_first:
                write_findings(self._path, prepared, config, result, evaluation)
                # Last, since it says that the run is finished.
                write_json(self._path / "result.json", result)
        show_result(self._display, self._path, result, rows=len(prepared.validation))
        return 0

"""One run in one process: files around the training loop."""

import resource
import signal
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from lora_cli.artifacts.adapter import load_adapter
from lora_cli.artifacts.checkpoint import (
    Checkpointer,
    list_checkpoints,
    load_latest_checkpoint,
)
from lora_cli.artifacts.run_dir import (
    MetricsFile,
    clear_run_dir,
    describe_environment,
    read_metrics,
    write_description,
    write_json,
)
from lora_cli.commands.continuing import install_base, load_start, merged_record
from lora_cli.commands.display import Display
from lora_cli.commands.phases import (
    FirstPhase,
    give_back_weights,
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
from lora_cli.commands.reporting import show_comparison
from lora_cli.commands.resuming import config_sha256, stopped_error
from lora_cli.commands.saving import (
    live_state,
    merge_trained,
    save_trained,
    unnamed,
    write_findings,
)
from lora_cli.commands.stopping import StopRequest
from lora_cli.config.commands import TrainConfig
from lora_cli.config.composed import Composed, recipe_text
from lora_cli.config.strategies import LoraThenFullStrategyConfig
from lora_cli.lora.method import build_method
from lora_cli.lora.prefix import without_prefix
from lora_cli.lora.state import load_adapter_state
from lora_cli.lora.strategies import why_unmergeable
from lora_cli.training.events import EvalDone, Event, RunEnded, TrainState
from lora_cli.training.loop import Plan, Trainer
from lora_cli.training.runtime import Runtime

_STOPPED = "stopped on request"


class Session:
    """One run in one process: files around the training loop."""

    def __init__(
        self,
        path: Path,
        composed: Composed,
        prepared: Prepared,
        runtime: Runtime,
        display: Display,
    ) -> None:
        self._path = path
        self._composed = composed
        self._config: TrainConfig = composed.config
        self._prepared = prepared
        self._runtime = runtime
        self._display = display
        self._stop = StopRequest(display)
        self._facts = {"config_sha256": config_sha256(composed.plain)}
        # Metrics of the base model, and of the adapter that the run starts from.
        self._base_metrics: Mapping[str, float] = {}
        self._start_metrics: Mapping[str, float] = {}
        # How the first of two phases ended; None before that, and in a run of one phase.
        self._first: FirstPhase | None = None

    def run(self, *, resume: bool) -> int:
        """Write the description, train, evaluate, write the results.

        Raises:
            KeyboardInterrupt: If interrupted with nothing saved.
            StoppedError: If stopped or interrupted with a checkpoint committed.
        """
        checkpoints = self._path / "checkpoints"
        state = load_latest_checkpoint(checkpoints, facts=self._facts) if resume else None
        if not resume:
            clear_run_dir(self._path)
        if self._merges_start():
            source = install_base(self._prepared.source, self._path)
            self._prepared = replace(self._prepared, source=source)
        write_description(
            self._path,
            recipe=recipe_text(self._composed),
            config=yaml.safe_dump(dict(self._composed.plain), sort_keys=False, allow_unicode=True),
            environment=describe_environment(
                seed=self._config.seed, device=str(self._runtime.device), base=self._base()
            ),
        )
        try:
            return self._train(state)
        except KeyboardInterrupt:
            steps = list_checkpoints(checkpoints)
            if not steps:
                raise
            raise stopped_error(self._path, max(steps)) from None

    def _merges_start(self) -> bool:
        return self._prepared.start is not None and self._prepared.start.is_merged

    def _train(self, state: TrainState | None) -> int:
        last_step = -1 if state is None else state.progress.step
        self._metrics = MetricsFile(self._path / "metrics.jsonl", last_step=last_step)
        has_two = isinstance(self._config.strategy, LoraThenFullStrategyConfig)
        with self._stop.listening():
            if has_two and state is not None:
                first = read_first_phase(self._path)
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
        plan = Plan(
            train=prepared.train,
            validation=prepared.validation,
            trainer=config.trainer,
            optimizer=config.optimizer,
            scheduler=config.scheduler,
            # Another order of rows in the second phase than in the first.
            seed=config.seed + (self._first is not None),
            may_be_unused=unnamed(prepared.saved, config.lora.modules_to_save),
        )
        checkpointer = Checkpointer(
            self._path / "checkpoints", keep=config.trainer.keep_checkpoints, facts=self._facts
        )
        listeners = (self._record, self._keep_best, checkpointer, self._display.on_event)
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
            self._metrics.base(self._base_metrics)
        if continues and prepared.start is not None:
            start, model = prepared.start, prepared.model
            load_start(start, model, prepared.saved, same_head=prepared.same_head)

    def _resume(self, trainer: Trainer, state: TrainState) -> None:
        load_adapter_state(self._prepared.model, dict(state.adapter), self._prepared.saved)
        trainer.resume(shift_state(state, -self._before))
        lines = read_metrics(self._path / "metrics.jsonl")
        self._start_metrics = _first_metrics(lines, "eval")
        self._base_metrics = _first_metrics(lines, "base") or self._start_metrics
        self._display.note(f"resuming after step {state.progress.step}")

    def _record(self, event: Event) -> None:
        """Listener: metrics.jsonl, without the second look at what the first phase has made."""
        again = isinstance(event, EvalDone) and 0 < event.step == self._before
        if not again:
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
        adapter, record = put_aside(self._path, module_names=self._prepared.module_names)
        first = FirstPhase(
            steps=ended.step,
            reason=ended.reason,
            progress=asdict(trainer.progress),
            metrics=record.metrics["adapter"],
        )
        state = live_state(self._prepared, adapter)
        self._enter_full(first, merged_state(self._prepared, state))
        write_first_phase(self._path, first)
        trainer = self._trainer()
        trainer.progress = first.begin()
        self._save_adapter(trainer.adapter(), first.metrics)
        self._display.note(f"merged the adapter of {ended.step} steps; now every weight is trained")
        return trainer

    def _enter_full(self, first: FirstPhase, merged: Mapping[str, torch.Tensor] | None) -> None:
        self._first = first
        self._prepared = prepare_full(self._prepared, self._config, merged)
        self._config = second_phase(self._config)
        # A wrapper of the first model would keep it in memory.
        self._runtime = Runtime(precision=self._config.trainer.precision)

    def _save_adapter(
        self, tensors: Mapping[str, torch.Tensor], metrics: Mapping[str, float]
    ) -> int:
        return save_trained(
            self._path,
            self._prepared,
            self._config,
            tensors,
            plain=self._composed.plain,
            base=self._base(),
            metrics={"base": dict(self._base_metrics), "adapter": dict(metrics)},
        )

    def _base(self) -> dict[str, Any]:
        source, start = self._prepared.source, self._prepared.start
        if start is not None and start.is_merged:
            return merged_record(start, source, self._path)
        return {"name": source.name, "revision": source.revision, "sha256": source.sha256}

    def _stopped(self, trainer: Trainer, ended: RunEnded) -> None:
        """Leave a usable adapter behind, and say how to go on.

        Raises:
            KeyboardInterrupt: On Ctrl-C before the first step: there is nothing to continue. Any
                other signal then ends the process, as it would have without us.
            StoppedError: Otherwise.
        """
        if ended.step == 0:
            signal.raise_signal(self._stop.signal or signal.SIGINT)
            raise KeyboardInterrupt
        if not (self._path / "adapter").exists():
            self._save_adapter(trainer.state().adapter, {})
        raise stopped_error(self._path, ended.step)

    def _finish(self, trainer: Trainer, ended: RunEnded) -> int:
        """Evaluate what was written, adapter and merged, and write result and report."""
        prepared, config = self._prepared, self._config
        adapter, _ = load_adapter(self._path / "adapter")
        state = live_state(prepared, adapter)
        load_adapter_state(prepared.model, state, prepared.saved)
        self._display.note(
            "evaluating the saved adapter"
            + (
                ", then merged into the base"
                if why_unmergeable(config.strategy.name) is None
                else ""
            )
        )
        evaluation = trainer.evaluate()
        metrics = evaluation.metrics(prepared.task)
        adapter_bytes = self._save_adapter(state, metrics)
        merged = self._evaluate_merged(trainer)
        best_step = (trainer.progress.best_step or 0) + self._before
        columns = self._columns(metrics, merged)
        name = prepared.task.metric
        result = {
            "exit_code": 0,
            "reason": ended.reason,
            "metric": {"name": name, "value": metrics[name], "split": "validation"},
            **columns,
            "steps": ended.step,
            "best_step": best_step,
            "seconds": ended.seconds,
            "samples_per_second": ended.samples_per_second,
            "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "trainable_parameters": sum(p.numel() for p in trainer.parameters.values()),
            "adapter_bytes": adapter_bytes,
            **({} if self._first is None else self._first.as_json(ended)),
        }
        write_findings(self._path, prepared, config, result, evaluation)
        # Last, since it says that the run is finished.
        write_json(self._path / "result.json", result)
        show_comparison(self._display, "validation", len(prepared.validation), columns)
        self._display.note(f"best checkpoint: step {best_step} of {ended.step}")
        self._display.note(f"run directory: {self._path}")
        self._display.result({"run": str(self._path), **result})
        return 0

    def _evaluate_merged(self, trainer: Trainer) -> Mapping[str, float] | None:
        """Merge and evaluate; None where that cannot be done, which is told."""
        strategy = self._config.strategy.name
        if why := why_unmergeable(strategy):
            self._display.note(f"not merged: {why}")
            return None
        give_back_weights(self._prepared, self._config, self._display)
        merge_trained(self._prepared)
        return trainer.evaluate().metrics(self._prepared.task)

    def _columns(
        self, metrics: Mapping[str, float], merged: Mapping[str, float] | None
    ) -> dict[str, Any]:
        """Return the forms of the model that are compared, in order."""
        columns: dict[str, Any] = {"base": dict(self._base_metrics)}
        start = self._prepared.start
        if start is not None and not start.is_merged:
            columns["start"] = dict(self._start_metrics)
        if self._first is not None:
            columns["lora"] = dict(self._first.metrics)
        return {**columns, "adapter": metrics, "merged": merged}


def _first_metrics(lines: Sequence[Mapping[str, Any]], event: str) -> Mapping[str, float]:
    found: Mapping[str, float] = next((x["metrics"] for x in lines if x["event"] == event), {})
    return found

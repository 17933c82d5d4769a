"""`lora-cli train`: from a configuration to a run directory with an adapter."""

import json
import resource
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from lora_cli.artifacts.adapter import AdapterRecord, load_adapter, save_adapter
from lora_cli.artifacts.card import model_card
from lora_cli.artifacts.checkpoint import (
    Checkpointer,
    list_checkpoints,
    load_latest_checkpoint,
)
from lora_cli.artifacts.peft_format import PeftAdapter
from lora_cli.artifacts.report import write_report
from lora_cli.artifacts.run_dir import (
    MetricsFile,
    check_inputs,
    check_run_dir,
    choose_run_dir,
    clear_run_dir,
    describe_environment,
    locked,
    read_metrics,
    write_description,
    write_json,
)
from lora_cli.commands.display import Display
from lora_cli.commands.options import Options
from lora_cli.commands.preparing import Prepared, prepare
from lora_cli.commands.reporting import card_data, report_data, show_comparison
from lora_cli.commands.resuming import (
    check_run_named,
    config_sha256,
    finished_result,
    show_finished,
    stopped_error,
)
from lora_cli.commands.stopping import StopRequest
from lora_cli.config.commands import TrainConfig
from lora_cli.config.composed import Composed, recipe_text
from lora_cli.errors import LoraCliError, UserError
from lora_cli.lora.merge import merge_lora
from lora_cli.lora.state import load_adapter_state
from lora_cli.tasks.table import FAMILIES
from lora_cli.training.evaluation import Evaluation
from lora_cli.training.events import EvalDone, Event, RunEnded, TrainState
from lora_cli.training.loop import Plan, Trainer
from lora_cli.training.runtime import Runtime


def run(composed: Composed, options: Options, display: Display) -> int:
    """Train, and return the exit code."""
    config: TrainConfig = composed.config
    sha256 = config_sha256(composed.plain)
    if options.resume:
        check_run_named(config.run, sha256)
    path = _run_dir(composed)
    _check_run_dir(path, composed, options)
    if options.resume and (result := finished_result(path, sha256)) is not None:
        show_finished(display, path, result)
        return 0
    runtime = Runtime(precision=config.trainer.precision)
    prepared = prepare(config, display)
    with locked(path):
        _check_run_dir(path, composed, options)
        session = Session(path, composed, prepared, runtime, display)
        try:
            return session.run(resume=options.resume)
        except UserError:
            # It did not start, so an earlier result stands.
            raise
        except LoraCliError as error:
            reason = "; ".join(problem.message for problem in error.problems)
            write_json(path / "result.json", {"exit_code": error.exit_code, "reason": reason})
            raise


def _run_dir(composed: Composed) -> Path:
    config: TrainConfig = composed.config
    return choose_run_dir(
        directory=config.run.dir,
        name=config.run.name,
        task=composed.choices.get("task") or config.task.family,
        model=composed.choices.get("model") or Path(config.model.path or "model").name,
        suffix=f"-{composed.job_number}" if composed.multirun else "",
    )


def _check_run_dir(path: Path, composed: Composed, options: Options) -> None:
    config: TrainConfig = composed.config
    check_run_dir(path, overwrite=options.overwrite, resume=options.resume)
    if options.resume or not options.overwrite:
        return
    # Origins are "file:line" for what a recipe sets.
    files = {origin.rpartition(":")[0] or origin for origin in composed.origins.values()}
    inputs = dict.fromkeys(sorted(files), "the recipe")
    for name, source in (("model.path", config.model.path), ("the data", config.task.data.path)):
        if source is not None:
            inputs[source] = name
    check_inputs(path, inputs)


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
        self._base_metrics: Mapping[str, float] = {}

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

    def _train(self, state: TrainState | None) -> int:
        with self._stop.listening():
            trainer = self._trainer(state)
            ended = trainer.run()
        if ended.reason == "stopped on request":
            self._stopped(trainer, ended)
        return self._finish(trainer, ended)

    def _trainer(self, state: TrainState | None) -> Trainer:
        prepared, config = self._prepared, self._config
        last_step = 0 if state is None else state.progress.step
        metrics = MetricsFile(self._path / "metrics.jsonl", last_step=last_step if state else -1)
        trainer = Trainer(
            task=prepared.task,
            model=prepared.model,
            saved_modules=prepared.saved,
            plan=Plan(
                train=prepared.train,
                validation=prepared.validation,
                trainer=config.trainer,
                optimizer=config.optimizer,
                scheduler=config.scheduler,
                seed=config.seed,
            ),
            runtime=self._runtime,
            listeners=(
                metrics,
                self._keep_best,
                Checkpointer(
                    self._path / "checkpoints",
                    keep=config.trainer.keep_checkpoints,
                    facts=self._facts,
                ),
                self._display.on_event,
            ),
            should_stop=self._stop,
        )
        if state is not None:
            load_adapter_state(prepared.model, dict(state.adapter), prepared.saved)
            trainer.resume(state)
            lines = read_metrics(self._path / "metrics.jsonl")
            self._base_metrics = next(
                (line["metrics"] for line in lines if line["event"] == "eval"), {}
            )
            self._display.note(f"resuming after step {last_step}")
        return trainer

    def _keep_best(self, event: Event) -> None:
        """Listener: keep the base's metrics, and write the adapter whenever it is the best."""
        if isinstance(event, EvalDone) and event.step == 0:
            self._base_metrics = event.metrics
        if isinstance(event, EvalDone) and event.is_best:
            self._save_adapter(event.adapter, event.metrics)

    def _save_adapter(
        self, tensors: Mapping[str, torch.Tensor], metrics: Mapping[str, float]
    ) -> int:
        prepared, config = self._prepared, self._config
        family = FAMILIES[config.task.family]
        adapter = PeftAdapter(
            r=config.lora.r,
            alpha=config.lora.alpha,
            dropout=config.lora.dropout,
            targets=prepared.targets.names,
            saved_modules=prepared.saved,
            task_type=family.task_type,
            base_name=config.model.hub_id or config.model.path or "",
            revision=config.model.revision,
            state=dict(tensors),
        )
        record = AdapterRecord(
            config=_portable(self._composed.plain),
            state=prepared.splits.state,
            base=self._base(),
            metrics={
                "split": "validation",
                "rows": len(prepared.validation),
                "base": dict(self._base_metrics),
                "adapter": dict(metrics),
            },
        )
        card = model_card(card_data(config, record, adapter, name=self._path.resolve().name))
        return save_adapter(
            self._path / "adapter",
            adapter,
            record,
            card=card,
            module_names=prepared.module_names,
        )

    def _base(self) -> dict[str, Any]:
        source = self._prepared.source
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
        folder = self._path / "adapter"
        adapter, _ = load_adapter(folder)
        load_adapter_state(prepared.model, adapter.state, prepared.saved)
        self._display.note("evaluating the saved adapter, then merged into the base")
        evaluation = trainer.evaluate()
        metrics = evaluation.metrics(prepared.task)
        adapter_bytes = self._save_adapter(adapter.state, metrics)
        merge_lora(prepared.model)
        merged = trainer.evaluate().metrics(prepared.task)
        name = prepared.task.metric
        result = {
            "exit_code": 0,
            "reason": ended.reason,
            "metric": {"name": name, "value": metrics[name], "split": "validation"},
            "base": dict(self._base_metrics),
            "adapter": metrics,
            "merged": merged,
            "steps": ended.step,
            "best_step": trainer.progress.best_step,
            "seconds": ended.seconds,
            "samples_per_second": ended.samples_per_second,
            "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "trainable_parameters": sum(p.numel() for p in trainer.parameters.values()),
            "adapter_bytes": adapter_bytes,
        }
        self._write_predictions(evaluation)
        write_report(
            self._path / "report.html",
            report_data(
                self._path,
                config,
                result=result,
                details=prepared.task.report(evaluation.predictions),
                notes=prepared.splits.notes,
            ),
        )
        # Last, since it says that the run is finished.
        write_json(self._path / "result.json", result)
        columns = {"base": self._base_metrics, "adapter": metrics, "merged": merged}
        show_comparison(self._display, "validation", len(prepared.validation), columns)
        self._display.note(f"best checkpoint: step {trainer.progress.best_step} of {ended.step}")
        self._display.note(f"run directory: {self._path}")
        self._display.result({"run": str(self._path), **result})
        return 0

    def _write_predictions(self, evaluation: Evaluation) -> None:
        task = self._prepared.task
        path = self._path / "predictions" / "validation.jsonl"
        path.parent.mkdir(exist_ok=True)
        lines = [json.dumps(task.to_json(p), ensure_ascii=False) for p in evaluation.predictions]
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def _portable(plain: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration without places on this machine, since adapters are shared."""
    copy: dict[str, Any] = json.loads(json.dumps(plain))
    copy["run"] = {"dir": None, "name": None}
    data = copy["task"]["data"]
    if data["path"] is not None and Path(data["path"]).is_absolute():
        data["path"] = None
    return copy

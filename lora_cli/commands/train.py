"""`lora-cli train`: from a configuration to a run directory with an adapter."""

from pathlib import Path

from lora_cli.artifacts.run_dir import (
    check_inputs,
    check_run_dir,
    choose_run_dir,
    locked,
    write_json,
)
from lora_cli.commands.continuing import base_staged, find_start
from lora_cli.commands.display import Display
from lora_cli.commands.options import Options
from lora_cli.commands.preparing import prepare
from lora_cli.commands.resuming import (
    check_run_named,
    config_sha256,
    finished_result,
    show_finished,
)
from lora_cli.commands.session import Session
from lora_cli.config.commands import TrainConfig
from lora_cli.config.composed import Composed
from lora_cli.errors import LoraCliError, UserError
from lora_cli.training.runtime import Runtime


def run(composed: Composed, options: Options, display: Display) -> int:
    """Train, and return the exit code."""
    composed, start = find_start(composed)
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
    with base_staged(path, start, resume=options.resume) as staged:
        prepared = prepare(config, display, start=start, staged=staged)
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
    for name, source in (
        ("model.path", config.model.path),
        ("the data", config.task.data.path),
        ("the adapter to start from", config.adapter),
    ):
        if source is not None:
            inputs[source] = name
    check_inputs(path, inputs)

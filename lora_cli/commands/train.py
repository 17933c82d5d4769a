"""`lora-cli train`: from a configuration to a run directory with an adapter."""

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from lora_cli.artifacts.lock import check_free, locked
from lora_cli.artifacts.run_dir import (
    check_inputs,
    check_run_dir,
    choose_run_dir,
)
from lora_cli.commands import smoke
from lora_cli.commands.continuing import find_start
from lora_cli.commands.display import Display
from lora_cli.commands.failing import add_what_is_saved, refusal_cleared
from lora_cli.commands.launching import launch, must_launch
from lora_cli.commands.merged_base import base_staged
from lora_cli.commands.observing import observing
from lora_cli.commands.options import Options
from lora_cli.commands.preparing import prepare
from lora_cli.commands.restoring import (
    Resumption,
    find_resumption,
    record_failure,
    storage_errors_told,
)
from lora_cli.commands.resuming import (
    check_run_named,
    config_sha256,
    finished_result,
    show_finished,
)
from lora_cli.commands.session import Session
from lora_cli.commands.stopping import StopRequest
from lora_cli.config.commands import TrainConfig
from lora_cli.config.composed import Composed
from lora_cli.config.distributed import check_shares
from lora_cli.config.duration import parse_duration
from lora_cli.errors import LoraCliError, UserError
from lora_cli.ranks import was_restarted, world_size
from lora_cli.training.events import Event, Listener
from lora_cli.training.group import Group, join_group
from lora_cli.training.runtime import Runtime, check_device, use_tf32
from lora_cli.training.trackers import check_installed


def run(composed: Composed, options: Options, display: Display) -> int:
    """Train, in this process or in several that it starts, and return the exit code."""
    config: TrainConfig = composed.config
    if config.smoke:
        return smoke.run(composed, options, display, train=run)
    if must_launch(config.distributed):
        return launch(composed, options, display)
    if problems := list(check_shares(config.trainer, world_size())):
        raise UserError(problems)
    check_installed(config.tracker)
    stop = StopRequest(display, max_seconds=parse_duration(config.trainer.max_time))
    with stop.listening():
        group = join_group(config.distributed.timeout)
        with group.reporting():
            return _run(composed, options, display, group, stop=stop)


def _run(
    composed: Composed, options: Options, display: Display, group: Group, *, stop: StopRequest
) -> int:
    composed, start = find_start(composed)
    config: TrainConfig = composed.config
    sha256 = config_sha256(composed.plain)
    wanted = find_resumption(config.trainer.resume, config.run, options)
    path = Path(group.first(lambda: str(_named_run(composed, wanted, sha256))))
    options = replace(options, resume=group.first(lambda: wanted.applies(path)))
    options = _after_restart(path, options, group)
    group.first(lambda: _check_run_dir(path, composed, options))
    group.first(lambda: check_free(path))
    if options.resume and wanted.checkpoint is None:
        result = group.first(lambda: finished_result(path, sha256))
        if result is not None:
            show_finished(display, path, result)
            return 0
    check_device(config.trainer)
    use_tf32(config.trainer.tf32)
    runtime = Runtime(
        precision=config.trainer.precision,
        timeout=config.distributed.timeout,
        shard_base=config.distributed.shard_base,
    )
    with base_staged(path, start, resume=options.resume) as staged, ExitStack() as held:
        with group.together():
            prepared = prepare(config, display, start=start, staged=staged)
        with group.together():
            if group.is_first:
                had_folder = path.exists()
                held.enter_context(locked(path))
                _check_run_dir(path, composed, options)
                clearing = refusal_cleared(path, is_resumed=options.resume, had_folder=had_folder)
                held.enter_context(clearing)
        observe: Listener = _ignore
        if group.is_first:
            observe = held.enter_context(observing(path, composed))
        session = Session(path, composed, prepared, runtime, display, stop=stop, observe=observe)
        try:
            with storage_errors_told(path):
                checkpoint = None if was_restarted() else wanted.checkpoint
                return session.run(resume=options.resume, checkpoint=checkpoint)
        except UserError:
            # It did not start, so an earlier result stands.
            raise
        except LoraCliError as error:
            add_what_is_saved(error, path)
            if group.is_first:
                record_failure(path, error)
            raise


def _ignore(_: Event) -> None:
    pass


def _named_run(composed: Composed, wanted: Resumption, sha256: str) -> Path:
    if wanted.run is not None:
        return wanted.run
    if wanted.is_strict:
        check_run_named(composed.config.run, sha256)
    return _run_dir(composed)


def _after_restart(path: Path, options: Options, group: Group) -> Options:
    """Let processes that take the place of some that died go on with what these have begun."""
    has_begun = group.first(lambda: (path / "environment.json").is_file())
    if was_restarted() and has_begun:
        return replace(options, resume=True, overwrite=False)
    return options


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

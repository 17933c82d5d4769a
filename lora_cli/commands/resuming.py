"""Which run `--resume` means, whether it has ended already, and how to go on with a stopped one."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_cli.artifacts.adapter import load_adapter
from lora_cli.artifacts.checkpoint import list_checkpoints
from lora_cli.artifacts.commit import DamagedFolderError, verify_folder
from lora_cli.artifacts.run_dir import read_config
from lora_cli.artifacts.run_state import resume_command
from lora_cli.commands.display import Display
from lora_cli.commands.reporting import ORDER, show_comparison
from lora_cli.commands.stopping import StopRequest
from lora_cli.config.schema import flatten
from lora_cli.config.sections import RunConfig
from lora_cli.config.task_families import COMPARING
from lora_cli.errors import Problem, StoppedError, UserError

_MAX_SHOWN = 5
# Sections and settings that decide nothing about what is computed.
_FREE = {"run", "distributed", "tracker", "tracking", "trainer.resume", "trainer.max_time"}
_FREE |= {"trainer.log_rows"}
# Rows in memory at once: a run that ran out of memory goes on with fewer, with the same gradients.
_MICRO = "trainer.micro_batch_size"
_FREE |= {_MICRO, "trainer.eval_batch_size", "trainer.auto_micro_batch"}


def config_sha256(plain: Mapping[str, Any]) -> str:
    """Hash what a resumed run must share: all but where it is, how it runs and who is told."""
    values = flatten(plain)
    # Of some losses the rows in memory at once are a part.
    free = _FREE - ({_MICRO} if values.get("task.family") in COMPARING else set())
    shared = {
        name: value
        for name, value in values.items()
        if name not in free and name.partition(".")[0] not in free
    }
    return hashlib.sha256(json.dumps(shared, sort_keys=True).encode()).hexdigest()


def check_run_named(run: RunConfig, sha256: str) -> None:
    """Refuse to guess which run is to be resumed.

    Args:
        run: Where the run directory is.
        sha256: Hash of the configuration, which the runs that can be meant share.

    Raises:
        UserError: If there is neither `run.dir` nor `run.name`; it lists what can be meant.
    """
    if run.dir is not None or run.name is not None:
        return
    found = _unfinished_runs(Path("runs"), sha256)[:_MAX_SHOWN]
    without = "there is no unfinished run of this configuration under runs/: leave --resume out"
    raise UserError(
        Problem(
            id="run.resume-which",
            message="`run.dir` must name the run that `--resume` continues, but is not set.",
            key="run.dir",
            allowed=", ".join(str(path) for path in found) or None,
            fix=resume_command(found[0]) if found else f"{without}, or give run.dir=PATH",
        )
    )


def _unfinished_runs(folder: Path, sha256: str) -> list[Path]:
    """Return the runs of a configuration that have not ended well, newest first."""
    runs: list[tuple[float, Path]] = []
    for config in folder.glob("*/config.yaml"):
        try:
            is_same = config_sha256(read_config(config)) == sha256
            began = config.stat().st_mtime
        except (UserError, OSError, TypeError):
            # Whatever this folder is, it is no run that can be resumed.
            continue
        if is_same and _read_result(config.parent).get("exit_code") != 0:
            runs.append((began, config.parent))
    return [path for _, path in sorted(runs, reverse=True)]


def _read_result(path: Path) -> dict[str, Any]:
    """Return result.json of a run; empty where there is none that can be read."""
    try:
        result = json.loads((path / "result.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return result if isinstance(result, dict) else {}


def finished_result(path: Path, sha256: str) -> dict[str, Any] | None:
    """Return the result of a run that has nothing left to do, else None.

    Args:
        path: The run directory.
        sha256: Hash of the configuration; a run of another one does not count.
    """
    result = _read_result(path)
    steps = list_checkpoints(path / "checkpoints")
    if result.get("exit_code") != 0 or not steps or result.get("steps") != max(steps):
        return None
    try:
        manifest = verify_folder(steps[max(steps)])
        load_adapter(path / "adapter")
    except (DamagedFolderError, UserError):
        # Resuming it makes up for what is lost.
        return None
    return result if manifest.get("config_sha256") == sha256 else None


def show_finished(display: Display, path: Path, result: Mapping[str, Any]) -> None:
    """Show the stored result of a run that is not run again."""
    _, record = load_adapter(path / "adapter")
    columns = {form: result[form] for form in ORDER if form in result}
    show_comparison(display, "validation", int(record.metrics["rows"]), columns)
    display.note("run is finished already")
    display.note(f"run directory: {path}")
    display.result({"run": str(path), **result})


def stopped_error(path: Path, step: int, *, cause: str = "on request") -> StoppedError:
    """Return the error that says how far a run got, and how to go on."""
    return StoppedError(
        Problem(
            id="run.stopped",
            message=f"The run was stopped {cause}; everything up to step {step} is saved.",
            where=str(path),
            fix=resume_command(path),
        )
    )


def how_stopped(
    stop: StopRequest,
    path: Path,
    *,
    since: tuple[int, bool],
    at: tuple[int, bool] | None = None,
) -> BaseException:
    """Return what ends a stopped session: nothing saved, nothing new, or how to go on.

    A scheduler that starts the run again for as long as it can be resumed would do so for ever
    where the time is too short to get anywhere.

    Args:
        stop: What stopped it.
        path: The run directory.
        since: Step that the session began from, and whether the evaluation there was done or not
            due.
        at: The same of what is saved now; None where no evaluation is due.
    """
    if at is None:
        at = (max(list_checkpoints(path / "checkpoints"), default=0), True)
    if at[0] == 0:
        return stop.nothing_saved()
    if stop.timed_out and at <= since:
        return stop.nothing_new(at[0])
    return stopped_error(path, at[0], cause=stop.cause)

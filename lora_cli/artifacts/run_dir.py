"""The run directory: made once, never overwritten by accident, read by every later command."""

import json
import platform
import shutil
import subprocess
import sys
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from lora_cli.artifacts.commit import LEFTOVERS, remove_folder, replace_file, sync_path
from lora_cli.artifacts.lock import LOCK
from lora_cli.artifacts.room import find_obstacle
from lora_cli.errors import Problem, UserError
from lora_cli.log import logger
from lora_cli.training.events import BatchHalved, CheckpointDue, EvalDone, Event, StepDone

# What `train`, `eval`, `predict`, `merge` and `export` write here unless told otherwise.
WRITTEN = (
    "recipe.yaml",
    "config.yaml",
    "environment.json",
    "metrics.jsonl",
    "rows.jsonl",
    "result.json",
    "report.html",
    "checkpoints",
    "adapter",
    "adapter-lora",
    "base",
    "phases.json",
    "predictions",
    "merged",
    "model.onnx",
    "model.onnx.data",
    "adapter-peft",
    "status.json",
    "trackers.json",
    "metrics.csv",
    "tensorboard",
    "wandb",
    "mlruns",
    "trackio",
    "model-int8.onnx",
    "model-int8.onnx.data",
    "model.pt2",
    "model.gguf",
    "adapter.gguf",
    "ollama",
)
# Written in this order at the start; only the last of them makes the folder a run directory.
_FIRST = ("logs", "base", "recipe.yaml", "config.yaml")
_CHECKSUM = "crc32"
PACKAGES = ("lora-cli", "torch", "transformers", "datasets", "accelerate", "safetensors")


def choose_run_dir(
    *, directory: str | None, name: str | None, task: str, model: str, suffix: str = ""
) -> Path:
    """Return the run directory: `directory` exactly, else runs/<name>, else a name made up.

    A made-up name is ``<task>-<model>-<date-time>`` and is made unique where it is taken.
    """
    if directory is not None:
        return Path(directory)
    if name is not None:
        return Path("runs", name + suffix)
    stem = f"{task}-{model}-{datetime.now():%Y%m%d-%H%M%S}{suffix}"
    path, number = Path("runs", stem), 2
    while path.exists():
        path, number = Path("runs", f"{stem}-{number}"), number + 1
    return path


def check_run_dir(path: Path, *, overwrite: bool, resume: bool) -> None:
    """Refuse a directory that holds anything, unless it is to be replaced or continued.

    Raises:
        UserError: If the directory exists and the flags do not allow it; with `--overwrite`, if
            it is not a run directory, since something else would be deleted.
    """
    if path.exists() and not path.is_dir():
        raise _exists(path, "it is a file", "choose another run.dir")
    if (obstacle := find_obstacle(path)) is not None:
        raise _exists(path, obstacle, "choose another run.dir")
    taken = path.exists() and not _is_untouched(path)
    is_run = has_begun(path)
    if taken and not is_run and not resume:
        why = "it holds something else than a run" + (", so it is not deleted" * overwrite)
        raise _exists(path, why, "choose another run.dir")
    if taken and not overwrite and not resume:
        fix = "--resume continues it, --overwrite replaces it, run.dir=PATH leaves it alone"
        raise _exists(path, "it exists", fix)
    if resume and not is_run and (taken or not (path / LOCK).exists()):
        raise UserError(
            Problem(
                id="run.nothing-to-resume",
                message=f"`run.dir` must hold a run to be resumed, but {path} does not.",
                key="run.dir",
                fix="leave --resume out to start the run",
            )
        )


def has_begun(path: Path) -> bool:
    """Whether a run has begun in a folder, so far that it can be resumed."""
    return (path / "config.yaml").is_file() and (path / "environment.json").is_file()


def _is_untouched(path: Path) -> bool:
    """Whether nothing is there but what a run writes before anything else.

    The lock is made in a folder that was found empty, so what a run that was killed right after
    has left beside it is its own.
    """
    names = {entry.name for entry in path.iterdir() if not entry.name.startswith(LEFTOVERS)}
    return names <= {LOCK} or (LOCK in names and names <= {LOCK, *_FIRST})


def _exists(path: Path, why: str, fix: str) -> UserError:
    return UserError(
        Problem(
            id="run.exists",
            message=f"`run.dir` must be a new or empty folder, but {path} cannot be used: {why}.",
            key="run.dir",
            fix=fix,
        )
    )


def check_inputs(path: Path, inputs: Mapping[str, str]) -> None:
    """Refuse to clear a run directory that holds what the run is about to read.

    Args:
        path: The run directory.
        inputs: What each input is, by its path; names of the model hub are no harm.

    Raises:
        UserError: If an input is among the entries that `clear_run_dir` deletes.
    """
    doomed = {path.resolve() / entry.name for entry in _entries_of_run(path)}
    problems = [
        Problem(
            id="run.holds-input",
            message=f"`run.dir` must not hold what the run reads, since `--overwrite` deletes it, "
            f"but {source} is {name}.",
            key="run.dir",
            fix="choose another run.dir, or move that out of it",
        )
        for source, name in inputs.items()
        if not doomed.isdisjoint(_places(Path(source)))
    ]
    if problems:
        raise UserError(problems)


def _places(source: Path) -> Iterator[Path]:
    """Yield a path and the folders above it, both as written and with links followed."""
    for form in (source.absolute(), source.resolve()):
        for place in (form, *form.parents):
            yield place.parent.resolve() / place.name


def _entries_of_run(path: Path) -> list[Path]:
    if not path.exists():
        return []
    return [
        entry
        for entry in path.iterdir()
        if entry.name in WRITTEN or entry.name.startswith(LEFTOVERS)
    ]


def clear_run_dir(path: Path) -> None:
    """Delete what runs write here, and nothing else; `check_run_dir` has allowed it.

    What is killed meanwhile is still a run directory, and one that cannot be resumed: the
    checkpoints go first, as a whole, and what marks it as a run last.
    """
    checkpoints = path / "checkpoints"
    if checkpoints.is_dir() and not checkpoints.is_symlink():
        remove_folder(checkpoints)
        sync_path(path)
    order = {"environment.json": 1, "config.yaml": 2}
    for entry in sorted(_entries_of_run(path), key=lambda entry: order.get(entry.name, 0)):
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def write_description(
    path: Path, *, recipe: str, config: str, environment: Mapping[str, Any]
) -> None:
    """Write recipe.yaml, config.yaml and environment.json."""
    replace_file(path / "recipe.yaml", recipe.encode())
    replace_file(path / "config.yaml", config.encode())
    write_json(path / "environment.json", environment)


def read_config(path: Path) -> dict[str, Any]:
    """Return the resolved configuration of a run as plain values.

    Raises:
        UserError: If the file cannot be read as YAML.
    """
    try:
        return dict(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        raise UserError(
            Problem(
                id="run.config",
                message=f"config.yaml must be readable, but is not: {error}.",
                where=str(path),
                fix="use the run directory as `lora-cli train` wrote it",
            )
        ) from error


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write one JSON object, indented, as a whole or not at all."""
    replace_file(path, json.dumps(value, indent=2, ensure_ascii=False).encode() + b"\n")


def describe_environment(*, seed: int, device: str, base: Mapping[str, Any]) -> dict[str, Any]:
    """Return versions, device, seed, the caller's git commit and the base model."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: version(name) for name in PACKAGES},
        "device": device,
        "seed": seed,
        "git_commit": _git_commit(),
        "base": dict(base),
        # Not sys.argv, which Hydra replaces while it runs.
        "arguments": sys.orig_argv[1:],
    }


def _git_commit() -> str | None:
    """Return the commit of the repository that the caller stands in, or None outside of one."""
    command = ["git", "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


class MetricsFile:
    """Listener that appends one JSON line per reported step and evaluation to metrics.jsonl.

    Each line ends with a checksum of its own: a number that a disk has changed is not believed.

    Told of a checkpoint before the `Checkpointer` is, it forces to disk what came before.

    Args:
        path: File to append to.
        last_step: Lines after this step are removed first, since a resumed run repeats them.
    """

    def __init__(self, path: Path, *, last_step: int) -> None:
        self._path = path
        lines = read_metrics(path)
        kept = [line for line in lines if line["step"] <= last_step]
        replace_file(path, "".join(_sealed(line) for line in kept).encode())

    def __call__(self, event: Event) -> None:
        """Write the event, if it is one that is kept."""
        if isinstance(event, StepDone) and event.log:
            self._append(
                {
                    "event": "train",
                    "step": event.step,
                    "epoch": event.epoch,
                    "loss": event.loss,
                    "lr": event.lr,
                    "grad_norm": event.grad_norm,
                    "samples_per_second": event.samples_per_second,
                }
            )
        elif isinstance(event, EvalDone):
            self._append(
                {
                    "event": "eval",
                    "step": event.step,
                    "metrics": dict(event.metrics),
                    "is_best": event.is_best,
                }
            )
        elif isinstance(event, BatchHalved):
            self._append({"event": "batch-halved", **asdict(event)})
        elif isinstance(event, CheckpointDue):
            # A power cut must not take lines away that lie before a checkpoint.
            sync_path(self._path)

    def base(self, metrics: Mapping[str, float]) -> None:
        """Write what the base model says, where step 0 is something else."""
        self._append({"event": "base", "step": 0, "metrics": dict(metrics)})

    def _append(self, line: Mapping[str, Any]) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(_sealed(line))


def _sealed(line: Mapping[str, Any]) -> str:
    """Return a line of JSON that ends with a checksum of what goes before."""
    text = json.dumps(line)
    return f'{text[:-1]}, "{_CHECKSUM}": "{zlib.crc32(text.encode()):08x}"}}\n'


def _unsealed(text: bytes) -> dict[str, Any] | None:
    """Return what `_sealed` was given, or None where the line is not as it was written."""
    try:
        line = json.loads(text)
        del line[_CHECKSUM]
    except (ValueError, RecursionError, LookupError, TypeError):
        return None
    return line if _sealed(line).encode() == text + b"\n" else None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a metrics file; a last line that was cut off is left out.

    What follows a damaged line is left out as well, with a warning.
    """
    lines: list[dict[str, Any]] = []
    if not path.exists():
        return lines
    texts = path.read_bytes().split(b"\n")
    for number, text in enumerate(texts, start=1):
        line = _unsealed(text)
        if line is None:
            if number < len(texts):
                logger.warning("warning: %s is damaged from line %d on", path, number)
            break
        lines.append(line)
    return lines

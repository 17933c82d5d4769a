"""Where a run goes on from, what must be as it was, and what is safe when it cannot write."""

import errno
import hashlib
import json
import platform
import re
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import nn

from lora_cli.artifacts.checkpoint import list_checkpoints, load_checkpoint, load_latest_checkpoint
from lora_cli.artifacts.commit import clean_leftovers
from lora_cli.artifacts.room import RAISE_LIMIT
from lora_cli.artifacts.run_dir import has_begun, write_json
from lora_cli.artifacts.run_state import resume_command
from lora_cli.commands.options import Options
from lora_cli.commands.preparing import Prepared
from lora_cli.commands.resuming import config_sha256
from lora_cli.config.composed import Composed
from lora_cli.config.sections import RunConfig
from lora_cli.data.media import without_place
from lora_cli.data.types import Row
from lora_cli.errors import LoraCliError, Problem, StorageError, UserError, is_storage_error
from lora_cli.lora.inject import trainable_parameters
from lora_cli.training.events import TrainState

_CHECKPOINT = re.compile(r"step-\d{8,}")
# Adapter and two moments; what other optimizers keep is of that size or smaller.
_TENSORS_PER_PARAMETER = 3
# Names and hashes of a tensor in headers and manifest, and what else a checkpoint holds.
_BYTES_PER_TENSOR, _BYTES_BESIDES = 512, 8192
_PACKAGES = ("lora-cli", "torch", "transformers")


@dataclass(frozen=True, kw_only=True, slots=True)
class Resumption:
    """What `--resume` and `trainer.resume` ask for.

    Attributes:
        is_strict: Whether there must be a run to continue.
        is_wanted: Whether a run is continued where there is one.
        run: The run directory that `trainer.resume` names, if it names one.
        checkpoint: The checkpoint that it names, if it names one.
    """

    is_strict: bool = False
    is_wanted: bool = False
    run: Path | None = None
    checkpoint: Path | None = None

    def applies(self, path: Path) -> bool:
        """Whether the run directory `path` is continued rather than made."""
        return self.is_strict or (self.is_wanted and has_begun(path))


def find_resumption(setting: str, run: RunConfig, options: Options) -> Resumption:
    """Return what `trainer.resume` and the flags ask for.

    Args:
        setting: `trainer.resume`.
        run: Where the run directory is.
        options: The flags.

    Raises:
        UserError: If they contradict each other, or nothing can be resumed from there.
    """
    if setting == "never":
        return Resumption(is_strict=options.resume, is_wanted=options.resume)
    if options.overwrite:
        raise _refused(setting, "be never with --overwrite, which starts anew", "leave one out")
    if setting == "auto":
        if run.dir is None and run.name is None and not options.resume:
            raise _refused(
                setting,
                "be never without run.dir or run.name, which say what to continue",
                "run.name=NAME",
            )
        return Resumption(is_strict=options.resume, is_wanted=True)
    place = Path(setting)
    checkpoint = place if _CHECKPOINT.fullmatch(place.absolute().name) else None
    folder = place if checkpoint is None else place.absolute().parent.parent
    if not (folder / "config.yaml").is_file() or not place.is_dir():
        raise _refused(
            setting,
            "be auto, never, or the folder of a run or checkpoint",
            "name a run such as runs/NAME, or runs/NAME/checkpoints/step-00000100",
        )
    named = run.dir or (run.name and str(Path("runs", run.name)))
    if named and Path(named).resolve() != folder.resolve():
        fix = "leave run.dir and run.name out, or trainer.resume"
        raise _refused(setting, f"name the run in {named}, where run.dir or run.name is", fix)
    return Resumption(is_strict=True, is_wanted=True, run=folder, checkpoint=checkpoint)


def _refused(setting: str, rule: str, fix: str) -> UserError:
    return UserError(
        Problem(
            id="resume.setting",
            message=f'`trainer.resume` must {rule}, but is "{setting}".',
            key="trainer.resume",
            fix=fix,
        )
    )


def _run_id(path: Path, *, resume: bool) -> str:
    """Return the id of a run, which its checkpoints carry; a new one where it starts.

    Raises:
        UserError: If the run is resumed and does not say.
    """
    if not resume or not (path / "environment.json").is_file():
        return uuid.uuid4().hex
    try:
        return str(json.loads((path / "environment.json").read_bytes())["run_id"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            Problem(
                id="resume.damaged",
                message="environment.json must say which run it is of, but cannot be read: "
                f"{type(error).__name__}: {error}.",
                where=str(path / "environment.json"),
                fix="start the run anew with --overwrite",
            )
        ) from None


def run_facts(
    path: Path, composed: Composed, prepared: Prepared, *, world_size: int, resume: bool
) -> dict[str, Any]:
    """Return what each checkpoint says of its run.

    Args:
        path: The run directory.
        composed: The configuration.
        prepared: The base model and the rows.
        world_size: Number of processes.
        resume: Whether the run has begun already, and so has an id.

    Raises:
        UserError: If the run is resumed and does not say which it is.
    """
    return {
        "format": 1,
        "run_id": _run_id(path, resume=resume),
        "config_sha256": config_sha256(composed.plain),
        "base_sha256": prepared.source.sha256,
        "base_settings": dict(prepared.source.settings),
        "rows_sha256": rows_sha256(prepared.splits.rows),
        "world_size": world_size,
        "versions": {"python": platform.python_version(), **{n: version(n) for n in _PACKAGES}},
    }


def rows_sha256(rows: Mapping[str, tuple[Row, ...]]) -> str:
    """Hash the rows that a run trains and validates on; values that are no text by their kind."""
    found = hashlib.sha256()
    for split in ("train", "validation"):
        found.update(f"\0{split}\0".encode())
        for row in rows.get(split, ()):
            kept = {name: without_place(value) for name, value in row.values.items()}
            values = json.dumps([row.id, kept], sort_keys=True, default=lambda x: type(x).__name__)
            found.update(values.encode() + b"\n")
    return found.hexdigest()


def restore(path: Path, checkpoint: Path | None, *, facts: Mapping[str, Any]) -> TrainState | None:
    """Return what a run goes on from: the checkpoint that was named, or the newest whole one.

    What killed processes have left is cleaned up, and an earlier result counts no longer.

    Raises:
        UserError: If the checkpoint is damaged, or not of this run.
    """
    clean_leftovers(path)
    if checkpoint is not None:
        state: TrainState | None = load_checkpoint(checkpoint, facts=facts)
    else:
        state = load_latest_checkpoint(path / "checkpoints", facts=facts)
    (path / "result.json").unlink(missing_ok=True)
    return state


def expected_bytes(model: nn.Module) -> int:
    """Return about how large a checkpoint of a model will be, headers and manifest included."""
    sizes = (p.numel() * p.dtype.itemsize for p in trainable_parameters(model).values())
    total = sum(size + _BYTES_PER_TENSOR for size in sizes)
    return _TENSORS_PER_PARAMETER * total + _BYTES_BESIDES


@contextmanager
def storage_errors_told(path: Path) -> Iterator[None]:
    """Turn errors of the file system in a run into one that says what is safe.

    Raises:
        StorageError: In place of such an error.
    """
    try:
        yield
    except OSError as error:
        if not is_storage_error(error):
            raise
        raise storage_error(path, error) from error


def record_failure(path: Path, error: LoraCliError) -> None:
    """Write why a run ended into result.json, as far as the disk lets us."""
    reason = "; ".join(problem.message for problem in error.problems)
    errors = [problem.id for problem in error.problems]
    result = {"exit_code": error.exit_code, "reason": reason, "errors": errors}
    with suppress(OSError):
        write_json(path / "result.json", result)


def storage_error(path: Path, error: OSError) -> StorageError:
    """Return the error that says what is safe after a failed write, and how to go on.

    Args:
        path: The run directory.
        error: What the system said.
    """
    steps = list_checkpoints(path / "checkpoints")
    safe = f"everything up to step {max(steps)} is saved" if steps else "nothing is saved yet"
    place = f" at {error.filename}" if error.filename else ""
    too_large = error.errno == errno.EFBIG
    first = RAISE_LIMIT if too_large else "free some space or make it writable"
    return StorageError(
        Problem(
            id="io.run",
            message=f"`run.dir` must stay writable, but there was an I/O error{place}: "
            f"{error.strerror or error}; {safe}.",
            where=str(path),
            fix=f"{first}, then: {resume_command(path)}",
        )
    )

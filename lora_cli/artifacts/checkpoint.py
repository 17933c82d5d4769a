"""Checkpoints of a run: ``checkpoints/step-00000100``, in safetensors and JSON.

MANIFEST.json says of each file its sha256 and of each tensor its name, shape and format, and of the
run what resuming must find again. A checkpoint belongs to the run whose id it carries: those of
other runs, and whatever else somebody has put there, are neither used nor deleted.
"""

import json
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from lora_cli.artifacts.commit import (
    MANIFEST,
    DamagedFolderError,
    clean_leftovers,
    commit_folder,
    remove_folder,
    verify_folder,
)
from lora_cli.artifacts.room import check_space
from lora_cli.errors import Problem, UserError
from lora_cli.log import logger
from lora_cli.training.events import CheckpointDue, Event, Progress, RunStarted, TrainState

ADAPTER, OPTIMIZER, PROGRESS = "adapter.safetensors", "optimizer.safetensors", "progress.json"
# Written even where they hold nothing: a checkpoint without them is none.
_ALWAYS = ("adapter", "optimizer")
_TENSORS = tuple(field.name for field in fields(TrainState) if field.name != "progress")
_STEP = re.compile(r"step-(\d{8,})")
CORRUPT = ".corrupt-"
# Report, predictions, logs and descriptions of a run.
_BYTES_OF_RESULTS = 300_000
# What must be the same when a run is resumed: key of the manifest, problem, sentence, advice.
_SAME = (
    (
        "config_sha256",
        "resume.other-config",
        "A run must be resumed with the configuration that it was started with, but this one "
        "differs.",
        "use {run}/recipe.yaml, or start anew in another run.dir",
    ),
    (
        "base_sha256",
        "resume.other-base",
        "A run must be resumed on the base weights that it was started on, but these have another "
        "sha256.",
        "put the earlier weights back, or start anew in another run.dir",
    ),
    (
        "base_settings",
        "resume.other-base",
        "A run must be resumed with the config.json and the tokenizer of the base that it was "
        "started with, but these differ.",
        "put the earlier files back, or start anew in another run.dir",
    ),
    (
        "rows_sha256",
        "resume.other-rows",
        "A run must be resumed on the rows that it was started on, but these differ.",
        "put the earlier data back, or start anew in another run.dir",
    ),
)


class Checkpointer:
    """Listener that commits a checkpoint when the loop asks for one, and removes old ones after.

    It removes what is old when the run starts as well, and then looks for room.

    Args:
        folder: The run's ``checkpoints`` folder.
        keep: Newest checkpoints to keep; the best one is kept besides.
        facts: Entries of each manifest, among them `config_sha256`, which resuming compares, and
            `run_id`.
        expected_bytes: About how large one will be; there must be room for all of them before the
            first step. None does not look.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep: int,
        facts: Mapping[str, Any],
        expected_bytes: int | None = None,
    ) -> None:
        self._folder = folder
        self._keep = keep
        self._facts = facts
        self._expected_bytes = expected_bytes

    def __call__(self, event: Event) -> None:
        """Save the state of a `CheckpointDue` event; look for room when the run starts."""
        if isinstance(event, RunStarted):
            # A run that was killed between the two has saved and not removed.
            own = self._own()
            if own:
                self._remove_old(keep_besides={_read_progress(own[max(own)]).best_step})
            if self._expected_bytes is not None:
                # Those that are kept, the best one, and one more while it is written.
                missing = self._keep + 2 - len(self._own())
                # A third of one is the adapter, which there is twice while it is replaced.
                check_space(
                    self._folder,
                    file_bytes=self._expected_bytes,
                    copies=max(missing, 2),
                    other_bytes=self._expected_bytes * 2 // 3 + _BYTES_OF_RESULTS,
                )
        elif isinstance(event, CheckpointDue):
            save_checkpoint(self._folder, event.state, facts=self._facts)
            self._remove_old(keep_besides={event.state.progress.best_step})

    def _own(self) -> dict[int, Path]:
        found = list_checkpoints(self._folder).items()
        return {step: path for step, path in found if is_of_run(path, self._facts)}

    def _remove_old(self, *, keep_besides: set[int | None]) -> None:
        own = self._own()
        for step in sorted(own)[: -self._keep]:
            if step in keep_besides:
                continue
            try:
                remove_folder(own[step])
            except OSError as error:
                # What is saved is saved; one checkpoint too many is no reason to end a run.
                logger.warning("warning: %s cannot be deleted: %s", own[step], error.strerror)


def checkpoint_path(folder: Path, step: int) -> Path:
    """Return where the checkpoint of a step is."""
    return folder / f"step-{step:08d}"


def list_checkpoints(folder: Path) -> dict[int, Path]:
    """Return the committed checkpoints by step, unverified; temporary and damaged ones left out."""
    if not folder.is_dir():
        return {}
    found = ((_STEP.fullmatch(path.name), path) for path in folder.iterdir())
    return {int(match[1]): path for match, path in found if match is not None}


def is_of_run(path: Path, facts: Mapping[str, Any]) -> bool:
    """Whether a checkpoint says that it was written by the run that `facts` are of."""
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        return bool(manifest.get("run_id") == facts.get("run_id"))
    except (OSError, ValueError, AttributeError, RecursionError):
        return False


def save_checkpoint(folder: Path, state: TrainState, *, facts: Mapping[str, Any]) -> Path:
    """Commit a state as ``folder/step-XXXXXXXX`` and return that path."""
    path = checkpoint_path(folder, state.progress.step)
    if path.exists() and not is_of_run(path, facts):
        aside = _set_aside(path, ".foreign-")
        logger.warning("warning: %s is of another run; set aside as %s", path, aside.name)
    groups = {name: dict(getattr(state, name)) for name in _TENSORS}
    groups = {n: tensors for n, tensors in groups.items() if tensors or n in _ALWAYS}
    files = {_file(name): safetensors.torch.save(tensors) for name, tensors in groups.items()}
    files[PROGRESS] = json.dumps(asdict(state.progress), indent=2).encode() + b"\n"
    described = {_file(name): _describe(tensors) for name, tensors in groups.items()}
    step = {"step": state.progress.step, "tensors": described}
    commit_folder(path, files, facts={**facts, **step})
    return path


def _file(group: str) -> str:
    return f"{group}.safetensors"


def _describe(tensors: Mapping[str, torch.Tensor]) -> dict[str, dict[str, Any]]:
    return {
        name: {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}
        for name, tensor in sorted(tensors.items())
    }


def _set_aside(path: Path, prefix: str) -> Path:
    aside = path.with_name(f"{prefix}{path.name}-{uuid.uuid4().hex[:8]}")
    return path.rename(aside)


def load_latest_checkpoint(folder: Path, *, facts: Mapping[str, Any]) -> TrainState | None:
    """Return the newest checkpoint of the run that verifies, or None where it has none.

    A damaged one is set aside under ``.corrupt-step-...`` with a warning and never deleted.

    Raises:
        UserError: If the checkpoint was written for another configuration, base or rows, or if
            there are checkpoints, but none that can be used.
    """
    clean_leftovers(folder)
    found = list_checkpoints(folder)
    for _, path in sorted(found.items(), reverse=True):
        try:
            manifest = verify_folder(path)
            if manifest.get("run_id") != facts.get("run_id"):
                logger.warning("warning: %s is of another run and is left alone", path)
                continue
            state = _read_state(path, manifest)
        except DamagedFolderError as error:
            aside = _set_aside(path, CORRUPT)
            logger.warning("warning: %s is damaged (%s); set aside as %s", path, error, aside.name)
            continue
        _check_same(path, manifest, facts)
        return state
    # A start from nothing would write over the adapter that the run has found so far.
    if found or (folder.is_dir() and any(p.name.startswith(CORRUPT) for p in folder.iterdir())):
        raise UserError(
            Problem(
                id="resume.no-checkpoint",
                message="A run must have a whole checkpoint of its own to be resumed, but what is "
                f"in {folder} is damaged or of another run.",
                where=str(folder),
                fix="put a copy of one back, or start anew with --overwrite",
            )
        )
    return None


def load_checkpoint(path: Path, *, facts: Mapping[str, Any]) -> TrainState:
    """Return one checkpoint, and set those of later steps of the run aside.

    They are kept under ``.later-step-...``: what follows is written anew.

    Raises:
        UserError: If it is damaged, of another run, or for another configuration, base or rows.
    """
    try:
        state, manifest = read_checkpoint(path, facts=facts)
    except DamagedFolderError as error:
        raise UserError(
            Problem(
                id="resume.damaged-checkpoint",
                message=f"`trainer.resume` must name a whole checkpoint, but {path} is none: "
                f"{error}.",
                key="trainer.resume",
                fix="name another one, or leave it to --resume to find the newest whole one",
            )
        ) from None
    _check_same(path, manifest, facts)
    for step, later in list_checkpoints(path.parent).items():
        if step > state.progress.step and is_of_run(later, facts):
            _set_aside(later, ".later-")
    return state


def read_checkpoint(path: Path, *, facts: Mapping[str, Any]) -> tuple[TrainState, dict[str, Any]]:
    """Return one checkpoint of the run and its manifest, and change nothing.

    Raises:
        DamagedFolderError: If it is missing, damaged or of another run.
    """
    manifest = verify_folder(path)
    if manifest.get("run_id") != facts.get("run_id"):
        raise DamagedFolderError("it is of another run than the folder that it is in")
    return _read_state(path, manifest), manifest


def _check_same(path: Path, manifest: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    problems = [
        Problem(
            id=problem,
            message=message,
            where=str(path),
            fix=fix.format(run=path.parent.parent),
        )
        for key, problem, message, fix in _SAME
        if manifest.get(key) != facts.get(key)
    ]
    if problems:
        # Another configuration explains other rows and another base.
        raise UserError(problems[:1])
    for name, now in facts.get("versions", {}).items():
        before = manifest.get("versions", {}).get(name)
        if before != now:
            logger.warning(
                "warning: the checkpoint is from %s %s and this is %s: the last digits may differ",
                *(name, before, now),
            )


def _read_progress(path: Path) -> Progress:
    return Progress(**json.loads((path / PROGRESS).read_bytes()))


def _read_state(path: Path, manifest: Mapping[str, Any]) -> TrainState:
    written: Sequence[str] = list(manifest["files"])
    try:
        progress = _read_progress(path)
        groups = {
            name: safetensors.torch.load((path / _file(name)).read_bytes())
            for name in _TENSORS
            if _file(name) in written or name in _ALWAYS
        }
        for name, tensors in groups.items():
            if _describe(tensors) != manifest["tensors"][_file(name)]:
                raise DamagedFolderError(f"{_file(name)} does not hold the tensors of {MANIFEST}")
        if progress.step != manifest["step"]:
            raise DamagedFolderError(f"{PROGRESS} is of another step than {MANIFEST}")
    except (OSError, ValueError, TypeError, KeyError, safetensors.SafetensorError) as error:
        raise DamagedFolderError(str(error)) from error
    return TrainState(progress=progress, **groups)

"""Checkpoints of a run: ``checkpoints/step-00000100``, in safetensors and JSON."""

import json
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch

from lora_cli.artifacts.commit import DamagedFolderError, commit_folder, verify_folder
from lora_cli.errors import Problem, UserError
from lora_cli.log import logger
from lora_cli.training.events import CheckpointDue, Event, Progress, TrainState

ADAPTER, OPTIMIZER, PROGRESS = "adapter.safetensors", "optimizer.safetensors", "progress.json"
METHOD = "method.safetensors"


class Checkpointer:
    """Listener that commits a checkpoint when the loop asks for one, and removes old ones after.

    Args:
        folder: The run's ``checkpoints`` folder.
        keep: Newest checkpoints to keep; the best one is kept besides.
        facts: Entries of each manifest, among them `config_sha256`, which resuming compares.
    """

    def __init__(self, folder: Path, *, keep: int, facts: Mapping[str, Any]) -> None:
        self._folder = folder
        self._keep = keep
        self._facts = facts

    def __call__(self, event: Event) -> None:
        """Save the state of a `CheckpointDue` event."""
        if isinstance(event, CheckpointDue):
            save_checkpoint(self._folder, event.state, facts=self._facts)
            best = event.state.progress.best_step
            self._remove_old(keep_besides=set() if best is None else {best})

    def _remove_old(self, *, keep_besides: set[int]) -> None:
        steps = sorted(list_checkpoints(self._folder))
        for step in steps[: -self._keep]:
            if step not in keep_besides:
                # Renamed first, so that a crash while deleting leaves no half checkpoint.
                doomed = self._folder / f".trash-{step:08d}"
                checkpoint_path(self._folder, step).rename(doomed)
                shutil.rmtree(doomed, ignore_errors=True)


def checkpoint_path(folder: Path, step: int) -> Path:
    """Return where the checkpoint of a step is."""
    return folder / f"step-{step:08d}"


def list_checkpoints(folder: Path) -> dict[int, Path]:
    """Return the committed checkpoints by step, unverified; temporary and damaged ones left out."""
    return {
        int(path.name.removeprefix("step-")): path for path in folder.glob("step-" + "[0-9]" * 8)
    }


def save_checkpoint(folder: Path, state: TrainState, *, facts: Mapping[str, Any]) -> Path:
    """Commit a state as ``folder/step-XXXXXXXX`` and return that path."""
    path = checkpoint_path(folder, state.progress.step)
    files = {
        ADAPTER: safetensors.torch.save(dict(state.adapter)),
        OPTIMIZER: safetensors.torch.save(dict(state.optimizer)),
        PROGRESS: json.dumps(asdict(state.progress), indent=2).encode() + b"\n",
    }
    if state.method:
        files[METHOD] = safetensors.torch.save(dict(state.method))
    commit_folder(path, files, facts={**facts, "step": state.progress.step})
    return path


def load_latest_checkpoint(folder: Path, *, facts: Mapping[str, Any]) -> TrainState | None:
    """Return the newest checkpoint that verifies, or None where there is none.

    A damaged one is set aside under ``.corrupt-step-...`` with a warning and never deleted.

    Raises:
        UserError: If the checkpoint was written by another configuration.
    """
    for _, path in sorted(list_checkpoints(folder).items(), reverse=True):
        try:
            manifest = verify_folder(path)
            state = _read_state(path)
        except DamagedFolderError as error:
            aside = path.with_name(f".corrupt-{path.name}-{uuid.uuid4().hex[:8]}")
            path.rename(aside)
            logger.warning("warning: %s is damaged (%s); set aside as %s", path, error, aside.name)
            continue
        if manifest.get("config_sha256") != facts["config_sha256"]:
            raise UserError(
                Problem(
                    id="resume.other-config",
                    message="A run must be resumed with the configuration that it was started "
                    "with, but this one differs.",
                    where=str(path),
                    fix=f"use {path.parent.parent / 'recipe.yaml'}, or start anew in another "
                    "run.dir",
                )
            )
        return state
    return None


def _read_state(path: Path) -> TrainState:
    try:
        progress = Progress(**json.loads((path / PROGRESS).read_bytes()))
        # The manifest tells of a file that was lost; most runs have none.
        method = (path / METHOD).read_bytes() if (path / METHOD).exists() else b""
        return TrainState(
            progress=progress,
            adapter=safetensors.torch.load((path / ADAPTER).read_bytes()),
            optimizer=safetensors.torch.load((path / OPTIMIZER).read_bytes()),
            method=safetensors.torch.load(method) if method else {},
        )
    except (OSError, ValueError, TypeError, safetensors.SafetensorError) as error:
        raise DamagedFolderError(str(error)) from error

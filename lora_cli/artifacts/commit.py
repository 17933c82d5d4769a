"""Folders that are either whole or not there.

A folder is written beside its final place, every file and the folder itself are synced to disk,
MANIFEST.json (sha256 and size of every file) comes last, and one rename puts it in place. A crash
at any point leaves the old folder or none. This module takes bytes and never imports torch.
"""

import hashlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lora_cli.errors import Problem, StorageError

MANIFEST = "MANIFEST.json"


class DamagedFolderError(Exception):
    """A committed folder is not what was written; the message names file and reason."""


def commit_folder(
    target: Path, files: Mapping[str, bytes], *, facts: Mapping[str, Any], manifest: bool = True
) -> None:
    """Write `files` as the folder `target`, replacing a folder of that name as a whole.

    Args:
        target: Folder to make; its parent is made if needed.
        files: File name to content.
        facts: Further entries of the manifest.
        manifest: Whether to write MANIFEST.json beside the files.

    Raises:
        OSError: If writing failed; `target` is then as it was before.
    """
    with staged_beside(target) as staged:
        for name, content in files.items():
            write_synced(staged / name, content)
        if manifest:
            entries = {
                name: {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
                for name, content in sorted(files.items())
            }
            text = json.dumps({**facts, "files": entries, "complete": True}, indent=2)
            write_synced(staged / MANIFEST, text.encode() + b"\n")
        _sync_folder(staged)
        put_in_place(staged, target)


@contextmanager
def staged_beside(target: Path) -> Iterator[Path]:
    """Give an empty folder beside `target`, and remove what is left of it at the end."""
    target.parent.mkdir(parents=True, exist_ok=True)
    staged = target.parent / f".tmp-{target.name}-{uuid.uuid4().hex[:8]}"
    staged.mkdir()
    try:
        yield staged
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def put_in_place(staged: Path, target: Path) -> None:
    """Rename the folder `staged` to `target`, and delete the folder or file that was there.

    Raises:
        OSError: If renaming failed; `target` is then as it was before.
    """
    replaced = target.parent / f".trash-{target.name}-{uuid.uuid4().hex[:8]}"
    if target.exists():
        target.rename(replaced)
    try:
        staged.rename(target)
    except BaseException:
        if replaced.exists():
            replaced.rename(target)
        raise
    _sync_folder(target.parent)
    if replaced.is_dir():
        shutil.rmtree(replaced, ignore_errors=True)
    else:
        replaced.unlink(missing_ok=True)


def find_obstacle(path: Path) -> str | None:
    """Return why nothing can be made at `path`, or None where nothing speaks against it."""
    parents = path.absolute().parents
    try:
        above = next((parent for parent in parents if parent.exists()), Path(path.anchor or "/"))
        path.exists()
    except OSError as error:
        return (error.strerror or str(error)).lower()
    if not above.is_dir():
        return f"{above} is a file"
    return None if os.access(above, os.W_OK | os.X_OK) else f"{above} cannot be written to"


def make_room(path: Path) -> None:
    """Make the folder that `path` goes into, and prove that something can be made there.

    The mode bits that `find_obstacle` goes by say nothing about file systems such as /proc.

    Raises:
        StorageError: If nothing can be made there.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".trash-{path.name}-", dir=path.parent):
            pass
    except OSError as error:
        raise StorageError(
            Problem(
                id="output.unusable",
                message=f"`output` must be a place where something can be made, but {path} "
                f"cannot be made: {(error.strerror or str(error)).lower()}.",
                key="output",
                fix="choose another place",
            )
        ) from error


def write_synced(path: Path, content: bytes) -> None:
    """Write a file and force it to disk; its mode follows the umask."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def replace_file(path: Path, content: bytes) -> None:
    """Write a file so that a reader sees the old content or the new one, never a part."""
    staged = path.with_name(f".tmp-{path.name}-{uuid.uuid4().hex[:8]}")
    try:
        write_synced(staged, content)
        staged.replace(path)
        _sync_folder(path.parent)
    finally:
        staged.unlink(missing_ok=True)


def verify_folder(folder: Path) -> dict[str, Any]:
    """Check every file of a committed folder against its manifest, and return the manifest.

    Raises:
        DamagedFolderError: If the manifest or a file is missing, cut or changed.
    """
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_bytes())
        entries: dict[str, dict[str, Any]] = manifest["files"]
        for name, entry in entries.items():
            if Path(name).name != name:
                raise DamagedFolderError(f"{MANIFEST} names a file outside the folder: {name!r}")
            content = (folder / name).read_bytes()
            if hashlib.sha256(content).hexdigest() != entry["sha256"]:
                raise DamagedFolderError(f"{name} does not match its sha256")
            if len(content) != entry["bytes"]:
                raise DamagedFolderError(f"{name} does not have the size in {MANIFEST}")
    except OSError as error:
        raise DamagedFolderError(f"{error.filename or folder}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedFolderError(f"{MANIFEST} is not readable ({error})") from error
    return manifest


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

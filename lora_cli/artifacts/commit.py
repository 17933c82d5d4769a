"""Folders that are either whole or not there.

A folder is written beside its final place, MANIFEST.json (sha256 and size of every file, and of
itself) comes last, everything is synced to disk, and one rename puts it in place. A crash or a
power cut at any point leaves the old folder or the new one. This module takes bytes and never
imports torch.

Whoever writes holds a lock on what is not in place yet. What a killed process has left there is
held by nobody, which is how `clean_leftovers` tells it from the work of a living one.
"""

import ctypes
import errno
import fcntl
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

MANIFEST = "MANIFEST.json"
# Beside NAME: not in place yet, no longer wanted, and moved away for a moment.
TEMPORARY, TRASH, OLD = ".tmp-", ".trash-", ".old-"
LEFTOVERS = (TEMPORARY, TRASH, OLD)
_OWN_HASH = "sha256"
_UNIQUE = 8
# Of renameat2 in <linux/fs.h> and of *at functions in <fcntl.h>.
_EXCHANGE, _AT_FDCWD = 2, -100


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
        OSError: If writing failed; `target` is then as it was before, or, where only the last
            sync to disk failed, the new folder.
    """
    with staged_beside(target) as staged:
        for name, content in files.items():
            (staged / name).write_bytes(content)
        if manifest:
            (staged / MANIFEST).write_bytes(_manifest(files, facts))
        put_in_place(staged, target)


def _manifest(files: Mapping[str, bytes], facts: Mapping[str, Any]) -> bytes:
    document: dict[str, Any] = {**facts, "files": describe_files(files), "complete": True}
    document[_OWN_HASH] = document_sha256(document)
    return json.dumps(document, indent=2).encode() + b"\n"


def describe_files(files: Mapping[str, bytes]) -> dict[str, dict[str, Any]]:
    """Return sha256 and size of each file, as `check_file` takes them."""
    return {
        name: {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
        for name, content in sorted(files.items())
    }


def document_sha256(document: Mapping[str, Any]) -> str:
    """Return the sha256 of a JSON object without its entry "sha256", whatever its layout."""
    rest = {name: value for name, value in document.items() if name != _OWN_HASH}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


@contextmanager
def staged_beside(target: Path) -> Iterator[Path]:
    """Give an empty folder beside `target`, and remove what is left of it at the end."""
    make_folders(target.parent)
    clean_leftovers(target.parent, name=target.name)
    staged, descriptor = _new_folder(target)
    try:
        yield staged
    finally:
        shutil.rmtree(staged, ignore_errors=True)
        if descriptor is not None:
            os.close(descriptor)


def _new_folder(target: Path) -> tuple[Path, int | None]:
    """Make a folder beside `target` and lock it, where the file system has locks."""
    while True:
        staged = _beside(target, TEMPORARY)
        staged.mkdir()
        try:
            return staged, _claim(staged)
        except BlockingIOError:
            # Somebody took it for a leftover in between, and will delete it.
            continue


def _beside(target: Path, prefix: str) -> Path:
    return target.with_name(f"{prefix}{target.name}-{uuid.uuid4().hex[:_UNIQUE]}")


def _claim(path: Path) -> int | None:
    """Lock a file or folder for this process, and return the descriptor that holds the lock.

    Returns:
        None where there are no such locks.

    Raises:
        BlockingIOError: If another process holds it.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def clean_leftovers(folder: Path, *, name: str | None = None) -> None:
    """Delete what killed processes have left of their work; what they moved away comes back.

    Args:
        folder: Where to look.
        name: Whose leftovers to delete; None deletes all.
    """
    with suppress(FileNotFoundError):
        for path in sorted(folder.iterdir()):
            prefix = next((p for p in LEFTOVERS if path.name.startswith(p)), None)
            if prefix is None:
                continue
            target = path.with_name(path.name.removeprefix(prefix)[: -_UNIQUE - 1])
            if name in (None, target.name):
                _clean(path, target, is_old=prefix == OLD)


def _clean(path: Path, target: Path, *, is_old: bool) -> None:
    try:
        descriptor = _claim(path)
    except BlockingIOError:
        return
    if descriptor is None:
        return
    try:
        if is_old and not os.path.lexists(target):
            path.rename(target)
        else:
            _delete(path)
    finally:
        os.close(descriptor)


def _delete(path: Path) -> None:
    """Delete a file or folder as far as possible; what stays is cleaned up another time."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def remove_folder(path: Path) -> None:
    """Delete a folder; a crash meanwhile leaves none of its name.

    Raises:
        OSError: If renaming it failed, or the sync to disk after that; it is then as it was.
    """
    doomed = _beside(path, TRASH)
    path.rename(doomed)
    try:
        # Otherwise a power cut may undo the renaming, and not what was deleted.
        sync_path(path.parent)
    except OSError:
        with suppress(OSError):
            doomed.rename(path)
        raise
    _delete(doomed)


def put_in_place(staged: Path, target: Path, *, sync: bool = True) -> None:
    """Sync `staged`, rename it to `target`, and delete the folder or file that was there.

    Without `sync`, a power cut soon after may leave files that are cut; nothing else can.

    Raises:
        OSError: If syncing or renaming failed; `target` is then as it was before, or, where only
            the last sync to disk failed, the new one.
    """
    if sync:
        _sync_tree(staged)
    if not os.path.lexists(target):
        staged.rename(target)
        sync_path(target.parent)
    elif _exchange(staged, target):
        sync_path(target.parent)
        _delete(staged)
    else:
        _replace_in_two(staged, target)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two names in one step; False where the system cannot, and nothing has changed."""
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if function is None:
        return False
    places = _AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second)
    if function(*places, _EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), str(second))


def _replace_in_two(staged: Path, target: Path) -> None:
    """Replace `target` by two renames; `clean_leftovers` undoes the first of them alone."""
    replaced = _beside(target, OLD)
    target.rename(replaced)
    try:
        staged.rename(target)
    except BaseException:
        replaced.rename(target)
        raise
    sync_path(target.parent)
    remove_folder(replaced)


def make_folders(path: Path) -> None:
    """Make a folder and those above it, so that a power cut does not take them away again."""
    if path.is_dir():
        return
    make_folders(path.parent)
    path.mkdir(exist_ok=True)
    sync_path(path.parent)


def replace_file(path: Path, content: bytes) -> None:
    """Write a file so that a reader sees the old content or the new one, never a part."""
    staged = _beside(path, TEMPORARY)
    try:
        with staged.open("xb") as file:
            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            staged.replace(path)
        sync_path(path.parent)
    finally:
        staged.unlink(missing_ok=True)


def sync_path(path: Path) -> None:
    """Force what was written to a file, or to a folder's list of names, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_tree(path: Path) -> None:
    if path.is_dir():
        for entry in sorted(path.rglob("*")):
            if not entry.is_symlink():
                sync_path(entry)
    sync_path(path)


def verify_folder(folder: Path) -> dict[str, Any]:
    """Check every file of a committed folder against its manifest, and return the manifest.

    Raises:
        DamagedFolderError: If the manifest or a file is missing, cut or changed.
    """
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_bytes())
        if document_sha256(manifest) != manifest[_OWN_HASH]:
            raise DamagedFolderError(f"{MANIFEST} does not match its own sha256")
        entries: dict[str, dict[str, Any]] = manifest["files"]
        for name, entry in entries.items():
            check_file(folder, name, entry)
    except OSError as error:
        raise DamagedFolderError(f"{error.filename or folder}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedFolderError(f"{MANIFEST} is not readable ({error})") from error
    return manifest


def check_file(folder: Path, name: str, entry: Mapping[str, Any]) -> None:
    """Check one file of a folder against its "sha256" and "bytes".

    Raises:
        OSError: If it cannot be read.
        KeyError: If an entry is missing.
        DamagedFolderError: If it differs, or would be outside of the folder.
    """
    if Path(name).name != name:
        raise DamagedFolderError(f"{MANIFEST} names a file outside the folder: {name!r}")
    with (folder / name).open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
        size = os.fstat(file.fileno()).st_size
    if found != entry["sha256"]:
        raise DamagedFolderError(f"{name} does not match its sha256")
    if size != entry["bytes"]:
        raise DamagedFolderError(f"{name} does not have the size that was written")

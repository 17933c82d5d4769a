"""Whether there is a place, and room enough in it, for what is about to be written."""

import errno
import os
import shutil
import tempfile
import uuid
from pathlib import Path

from lora_cli.artifacts.commit import TEMPORARY
from lora_cli.errors import Problem, StorageError


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


def check_space(folder: Path, *, file_bytes: int, copies: int) -> None:
    """Prove that files fit into a folder by having room set aside for them and given back.

    That sees quotas and limits of file size, which the number of free bytes does not tell.

    Args:
        folder: Where they will be; it need not exist yet.
        file_bytes: Size of one file.
        copies: How many of them there will be.

    Raises:
        OSError: If the folder cannot be written to.
        StorageError: If there is no room.
    """
    place = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    probe = place / f"{TEMPORARY}probe-{uuid.uuid4().hex[:8]}"
    probe.mkdir()
    made = 0
    try:
        for made in range(copies):
            _reserve(probe / str(made), file_bytes)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise StorageError(
            Problem(
                id="io.no-room",
                message=f"`run.dir` must have room for {copies * file_bytes / 1e6:,.1f} MB of "
                f"checkpoints, but setting that aside in {place} failed after "
                f"{made * file_bytes / 1e6:,.1f} MB: {(error.strerror or str(error)).lower()}.",
                key="run.dir",
                fix="free some space, lower trainer.keep_checkpoints, or choose another run.dir",
            )
        ) from error
    finally:
        shutil.rmtree(probe, ignore_errors=True)


def _reserve(path: Path, size: int) -> None:
    with path.open("xb") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
            # A file system that cannot set aside is asked for the number of free bytes.
            if shutil.disk_usage(path.parent).free < size:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error

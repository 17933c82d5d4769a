"""Whether there is a place, and room enough in it, for what is about to be written."""

import errno
import os
import shutil
import tempfile
import uuid
from collections.abc import Sequence
from pathlib import Path

from lora_cli.artifacts.commit import TEMPORARY
from lora_cli.errors import Problem, StorageError

RAISE_LIMIT = "raise the limit of file size (ulimit -f), or take another file system"


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


def check_space(folder: Path, *, file_bytes: int, copies: int, other_bytes: int = 0) -> None:
    """Prove that files fit into a folder by having room set aside for them and given back.

    That sees quotas and limits of file size, which the number of free bytes does not tell.

    Args:
        folder: Where they will be; it need not exist yet.
        file_bytes: Size of one file.
        copies: How many of them there will be.
        other_bytes: What is written besides, in files that are no larger.

    Raises:
        OSError: If the folder cannot be written to.
        StorageError: If there is no room.
    """
    more, rest = divmod(other_bytes, max(file_bytes, 1))
    sizes = [file_bytes] * (copies + more) + [rest] * (rest > 0)
    if found := _set_aside(folder, sizes):
        place, made, error = found
        fix = "free some space, lower trainer.keep_checkpoints, or choose another run.dir"
        raise StorageError(
            Problem(
                id="io.no-room",
                message=f"`run.dir` must have room for {sum(sizes) / 1e6:,.1f} MB of "
                f"checkpoints and results, but setting that aside in {place} failed after "
                f"{made / 1e6:,.1f} MB: {(error.strerror or str(error)).lower()}.",
                key="run.dir",
                fix=RAISE_LIMIT if error.errno == errno.EFBIG else fix,
            )
        ) from error


def check_output_space(output: Path, sizes: Sequence[int]) -> None:
    """Prove that files of these sizes fit beside `output`, where they are written before it.

    Raises:
        OSError: If nothing can be written there.
        StorageError: If there is no room.
    """
    if found := _set_aside(output.parent, sizes):
        place, made, error = found
        raise StorageError(
            Problem(
                id="io.no-room",
                message=f"`output` must have room for {sum(sizes) / 1e6:,.1f} MB of weights, but "
                f"setting that aside in {place} failed after {made / 1e6:,.1f} MB: "
                f"{(error.strerror or str(error)).lower()}.",
                key="output",
                fix=RAISE_LIMIT
                if error.errno == errno.EFBIG
                else "free some space, or choose another output",
            )
        ) from error


def _set_aside(folder: Path, sizes: Sequence[int]) -> tuple[Path, int, OSError] | None:
    """Set room aside and give it back; return where, after how many bytes and why that failed."""
    place = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    probe = place / f"{TEMPORARY}probe-{uuid.uuid4().hex[:8]}"
    probe.mkdir()
    made = 0
    try:
        for number, size in enumerate(sizes):
            _reserve(probe / str(number), size)
            made += size
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        return place, made, error
    finally:
        shutil.rmtree(probe, ignore_errors=True)
    return None


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

"""One process at a time in a run directory.

The lock is that of `flock` on ``.lock``: the system takes it away with the process that holds it,
however that ends, so there is no stale lock. The text in the file only says who holds it.
"""

import fcntl
import os
import platform
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from lora_cli.artifacts.commit import make_folders
from lora_cli.errors import Problem, UserError

LOCK = ".lock"
# A holder needs a moment between taking the lock and writing its name.
_TRIES, _PAUSE = 25, 0.01
_HOLDER = re.compile(r"process (\d+) on (\S+) since .*")


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the directory for this process; the lock goes with the process, however it ends.

    Raises:
        UserError: If another process holds it.
    """
    descriptor = _open(path)
    try:
        _take(descriptor, path, fcntl.LOCK_EX)
        while not _is_there(descriptor, path):
            # The process that held it has removed the folder, as it had made it for nothing.
            os.close(descriptor)
            descriptor = _open(path)
            _take(descriptor, path, fcntl.LOCK_EX)
        text = (
            f"process {os.getpid()} on {platform.node()} since {datetime.now():%Y-%m-%d %H:%M:%S}"
        )
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, text.encode(), 0)
        yield
    finally:
        os.close(descriptor)


def _open(path: Path) -> int:
    make_folders(path)
    return os.open(path / LOCK, os.O_RDWR | os.O_CREAT, 0o666)


def _is_there(descriptor: int, path: Path) -> bool:
    """Whether an open lock file is that of the folder, which may have been made anew."""
    try:
        return os.path.samestat(os.fstat(descriptor), (path / LOCK).stat())
    except FileNotFoundError:
        return False


def check_free(path: Path) -> None:
    """Refuse a directory that is in use, before any work is done; `locked` has the last word.

    Raises:
        UserError: If another process holds it.
    """
    try:
        descriptor = os.open(path / LOCK, os.O_RDONLY)
    except OSError:
        return
    try:
        _take(descriptor, path, fcntl.LOCK_SH)
    finally:
        os.close(descriptor)


def _take(descriptor: int, path: Path, operation: int) -> None:
    """Take the lock, or say who holds it.

    Raises:
        UserError: If another process holds it, and not only to look for a moment.
    """
    for number in range(_TRIES):
        try:
            fcntl.flock(descriptor, operation | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
            if number < _TRIES - 1 and not _may_hold(holder):
                time.sleep(_PAUSE)
                continue
            raise UserError(
                Problem(
                    id="run.locked",
                    message=f"`run.dir` must be free, but {path} is in use by "
                    f"{holder or 'another process'}.",
                    key="run.dir",
                    fix="wait for that run to end, or choose another run.dir",
                )
            ) from None
        else:
            return


def _may_hold(holder: str) -> bool:
    """Whether the process that the lock file names is alive, as far as can be told from here."""
    match = _HOLDER.fullmatch(holder)
    if match is None:
        return False
    if match[2] != platform.node():
        return True
    try:
        os.kill(int(match[1]), 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True

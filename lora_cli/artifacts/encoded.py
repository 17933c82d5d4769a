"""Encoded rows in the cache: a line of JSON for each, read through a memory map.

A file is written once, under a name that tells everything that it was made of, and ends with the
sha256 of what goes before: one that was cut off or damaged is made again, never read.
"""

import fcntl
import hashlib
import json
import mmap
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, overload

import numpy as np

from lora_cli.data.cache import cache_folder
from lora_cli.log import logger
from lora_cli.tasks.contract import Features

# What the cache holds at most, the last used last to go.
_MOST_BYTES = 20 * 2**30
_SUFFIX = ".jsonl"
# Bytes to look at together.
_PART = 2**24


class EncodedRows(Sequence[Features]):
    """The rows of a file that `write_encoded` made, each decoded when it is asked for.

    Args:
        path: The file.

    Raises:
        ValueError: If the file is not whole.
        OSError: If it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        # The last line is about those before it.
        end = self._map.rfind(b"\n", 0, len(self._map) - 1) + 1
        digest = hashlib.sha256()
        found = [np.zeros(1, np.int64)]
        for start in range(0, end, _PART):
            part = self._map[start : min(start + _PART, end)]
            digest.update(part)
            found.append(np.flatnonzero(np.frombuffer(part, np.uint8) == ord("\n")) + start + 1)
        if self._map[end:] != _trailer(digest.hexdigest()):
            message = "it is not as it was written"
            raise ValueError(message)
        # Where each row begins, and where the last one ends.
        self._starts = np.concatenate(found)

    def __len__(self) -> int:
        return len(self._starts) - 1

    @overload
    def __getitem__(self, index: int) -> Features: ...
    @overload
    def __getitem__(self, index: slice) -> list[Features]: ...
    def __getitem__(self, index: int | slice) -> Features | list[Features]:
        """Decode a row, or the rows of a slice."""
        places = range(len(self))[index]
        if isinstance(places, range):
            return [self[place] for place in places]
        row: Features = json.loads(self._map[self._starts[places] : self._starts[places + 1]])
        return row


def _trailer(sha256: str) -> bytes:
    return json.dumps({"sha256": sha256}).encode() + b"\n"


def encoded_path(fingerprint: str) -> Path:
    """Return where rows with this fingerprint are kept."""
    return cache_folder() / "encoded" / f"{fingerprint}{_SUFFIX}"


@contextmanager
def only_writer(path: Path) -> Iterator[None]:
    """Wait until no other process writes this file, and keep others from it.

    Raises:
        OSError: If there can be no such file.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    # One of sixteen locks, which stay: a lock that comes and goes can be held twice.
    descriptor = os.open(path.parent / f".lock-{path.name[0]}", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def read_encoded(path: Path) -> EncodedRows | None:
    """Return the rows of a file, or None if there is none; one that is damaged is removed.

    Raises:
        OSError: If it cannot be read.
    """
    try:
        rows = EncodedRows(path)
    except FileNotFoundError:
        return None
    except ValueError as error:
        logger.warning("warning: %s is encoded again, since %s", path, error)
        path.unlink()
        return None
    with suppress(OSError):
        os.utime(path)
    return rows


def write_encoded(path: Path, lines: Iterable[bytes]) -> EncodedRows:
    """Write rows, each a line of JSON, and return them as they are read back.

    Raises:
        OSError: If they cannot be written; there is no file then.
        Exception: Whatever making a line raises; there is no file then.
    """
    staged = path.with_suffix(f".tmp-{os.getpid()}")
    digest = hashlib.sha256()
    try:
        # Rows can be anything: their owner alone may read them.
        staged.touch(mode=0o600)
        with staged.open("wb") as file:
            for line in lines:
                file.write(line + b"\n")
                digest.update(line + b"\n")
            file.write(_trailer(digest.hexdigest()))
        staged.replace(path)
    finally:
        staged.unlink(missing_ok=True)
    _make_room(path)
    return EncodedRows(path)


def _make_room(newest: Path) -> None:
    """Remove what was not used for the longest time, as far as the cache is too large."""
    with suppress(OSError):
        files = [(path, path.stat()) for path in newest.parent.glob(f"*{_SUFFIX}")]
        total = sum(facts.st_size for _, facts in files)
        for path, facts in sorted(files, key=_last_used):
            if total <= _MOST_BYTES or path == newest:
                continue
            path.unlink(missing_ok=True)
            total -= facts.st_size


def _last_used(entry: tuple[Path, Any]) -> float:
    return float(entry[1].st_mtime)

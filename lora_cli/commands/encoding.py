"""Rows turned into what a task reads: once, by several processes, and kept for the next run."""

import hashlib
import importlib.metadata
import json
import multiprocessing
import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lora_cli.artifacts.encoded import encoded_path, only_writer, read_encoded, write_encoded
from lora_cli.commands.display import Display
from lora_cli.config.task_families import TaskConfig
from lora_cli.data.media import UnreadableError
from lora_cli.data.types import Row
from lora_cli.errors import Problem, RunFailedError
from lora_cli.models.processors import processor_facts
from lora_cli.models.sources import ModelSource
from lora_cli.tasks.contract import Features, Task

# Fewer are encoded in a moment.
KEPT_ROWS = 1000
# A process must encode so many rows to be worth the seconds of its start.
ROWS_OF_A_PROCESS = 20_000
_CHUNK = 256
# In the place of a row whose file cannot be read: its kind, name and reason.
_UNREADABLE = "unreadable"
# What decides how a row is encoded, besides what the caller knows.
_CODE = ("tasks", "data")
_PACKAGES = ("transformers", "tokenizers")


def encode_rows(
    task: Task, rows: Sequence[Row], name: str, display: Display, *, facts: Mapping[str, Any]
) -> Sequence[Features]:
    """Encode rows in order, or take them from the cache, and say how many were cut.

    Args:
        task: Encodes a row.
        rows: What to encode.
        name: Of the split, for notes and progress.
        display: Told of both.
        facts: What the task was made of; see `encoding_facts`.

    Raises:
        UserError: If a row cannot be encoded; UnreadableError names all whose files cannot be read.
        RunFailedError: If a process that encodes has died.
    """
    features = _cached(task, rows, name, display, facts)
    faults = [row[_UNREADABLE] for row in features if _UNREADABLE in row]
    if faults:
        raise UnreadableError(faults[0][0], [(file, reason) for _, file, reason in faults])
    cut = sum(bool(row["cut"]) for row in features)
    if cut:
        display.note(f"{name}: task.max_length cut {cut:,} of {len(rows):,} rows")
    return features


def encode_splits(
    task: Task, splits: Mapping[str, Sequence[Row]], display: Display, *, facts: Mapping[str, Any]
) -> dict[str, Sequence[Features]]:
    """Encode the rows of several splits as `encode_rows` does.

    Raises:
        UserError: As `encode_rows`; files that cannot be read are told of all splits together.
    """
    encoded: dict[str, Sequence[Features]] = {}
    faults: list[tuple[str, str]] = []
    kind = ""
    for name, rows in splits.items():
        try:
            encoded[name] = encode_rows(task, rows, name, display, facts=facts)
        except UnreadableError as error:
            kind = error.kind
            faults += error.found
    if faults:
        raise UnreadableError(kind, faults)
    return encoded


def encoding_facts(
    config: TaskConfig, state: Mapping[str, Any], processor: Any, source: ModelSource
) -> dict[str, Any]:
    """Return all that encoding depends on besides the rows, as JSON values.

    Args:
        config: Settings of the task; where the rows come from does not count.
        state: What the task learned from its data, its columns among it.
        processor: As it is used, with tokens that were added.
        source: The model, whose files of settings and processor are hashed.
    """
    settings = {name: value for name, value in asdict(config).items() if name != "data"}
    return {
        "settings": settings,
        "state": state,
        # A GGUF file has its tokenizer in itself.
        "model": dict(source.settings) or source.sha256,
        **processor_facts(processor),
        "code": _hash_code(),
        "packages": {name: importlib.metadata.version(name) for name in _PACKAGES},
    }


def _cached(
    task: Task, rows: Sequence[Row], name: str, display: Display, facts: Mapping[str, Any]
) -> Sequence[Features]:
    if len(rows) < KEPT_ROWS:
        return _in_memory(task, rows, name, display)
    path = encoded_path(_fingerprint(rows, facts))
    try:
        # The other processes of a run wait here, and read what the first has written.
        with only_writer(path):
            found = read_encoded(path)
            if found is None:
                with _lines(task, rows, name, display) as lines:
                    found = write_encoded(path, lines)
            return found
    except OSError as error:
        display.note(f"{name}: not kept in the cache, {path.parent}: {error.strerror}")
    return _in_memory(task, rows, name, display)


def _in_memory(task: Task, rows: Sequence[Row], name: str, display: Display) -> list[Features]:
    """Return rows as they would come from the cache: made of JSON values."""
    with _lines(task, rows, name, display) as lines:
        return [json.loads(line) for line in lines]


def _fingerprint(rows: Sequence[Row], facts: Mapping[str, Any]) -> str:
    """Return a sha256 of the rows and of all that decides how they are encoded."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=repr).encode())
    for row in rows:
        digest.update(json.dumps([row.id, row.values], default=repr).encode() + b"\n")
    return digest.hexdigest()


def _hash_code() -> str:
    """Return a sha256 of our own code that encodes."""
    digest = hashlib.sha256()
    root = Path(__file__).parent.parent
    for file in sorted(path for part in _CODE for path in (root / part).glob("*.py")):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


@contextmanager
def _lines(
    task: Task, rows: Sequence[Row], name: str, display: Display
) -> Iterator[Iterator[bytes]]:
    """Give the encoded rows as lines of JSON, in order, made by one process or several."""
    shown, processes = f"encode {name}", min(_cores(), len(rows) // ROWS_OF_A_PROCESS)
    if processes < 2:
        yield (_line(task, row) for row in display.track(shown, rows))
        return
    # Forked from a process of their own: ours has threads, and may hold a GPU.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lora_cli.tasks.table", "transformers"])
    pool = ProcessPoolExecutor(processes, context, initializer=_start, initargs=(task,))
    try:
        lines = pool.map(_encode, rows, chunksize=_CHUNK)
        yield (line for _, line in zip(display.track(shown, rows), lines, strict=True))
    except BrokenProcessPool as error:
        raise RunFailedError(_died()) from error
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _line(task: Task, row: Row) -> bytes:
    try:
        found = task.encode(row)
    except UnreadableError as error:
        # The rows after it may have such files too, and are to be told of together.
        found = {_UNREADABLE: [error.kind, *error.found[0]], "cut": 0}
    return json.dumps(found, ensure_ascii=False).encode()


# The task of a process that encodes.
_TASK: list[Task] = []


def _start(task: Task) -> None:
    """Begin a process that encodes; Ctrl-C is for the one that it works for."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _TASK.append(task)


def _encode(row: Row) -> bytes:
    return _line(_TASK[0], row)


def _cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _died() -> Problem:
    return Problem(
        id="data.encoder-died",
        message="The processes that encode rows must run to the end, but one was killed.",
        fix="free some memory, and train again",
    )

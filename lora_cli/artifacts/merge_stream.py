"""Writing a merged model tensor by tensor: each byte of the base is read once, and written once.

Some rows are read, changed and written while those before are hashed and written by other
threads, so that memory holds a few buffers and never a whole tensor.
"""

import ctypes
import hashlib
import json
import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lora_cli.artifacts.merge_plan import Piece, Shard
from lora_cli.artifacts.tensor_files import DTYPES, StoredWeights, header_bytes, read_into
from lora_cli.models.weights import INDEX, WEIGHTS

# Elements that are changed at a time: what float32 makes of them fits into a cache.
_ELEMENTS = 2**19
# Bytes that are copied at a time.
_COPIED = 2**21
# One is read, one is written, and one of each kind is in use.
_NUM_BUFFERS = 4
# Of mallopt in <malloc.h>.
_M_ARENA_MAX = -8


@dataclass(frozen=True, slots=True)
class Streamed:
    """What is known of a model that was written.

    Attributes:
        base: sha256 of each file of the base that was read.
        written: sha256 of each file of weights.
        num_bytes: Size of all tensors written.
    """

    base: Mapping[str, str]
    written: Mapping[str, str]
    num_bytes: int


@dataclass(slots=True)
class _Buffer:
    """Some bytes, and what still reads them."""

    content: bytearray = field(default_factory=bytearray)
    readers: list["Future[Any]"] = field(default_factory=list)

    def part(self, size: int) -> memoryview:
        """Return its beginning; a row may need more than any before."""
        if size > len(self.content):
            self.content = bytearray(size)
        return memoryview(self.content)[:size]

    def wait(self) -> None:
        """Wait until nothing reads them; raises what went wrong there."""
        for reader in self.readers:
            reader.result()
        self.readers.clear()


class _Input:
    """A file of the base, hashed from its first byte to its last, whatever is read of it."""

    def __init__(self, path: Path, *, hashing: ThreadPoolExecutor) -> None:
        self._file = path.open("rb")
        self._size = os.fstat(self._file.fileno()).st_size
        self._hash, self._hashing, self._done = hashlib.sha256(), hashing, 0

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def read(self, buffer: _Buffer, size: int, start: int) -> memoryview:
        """Fill the beginning of a buffer, which is read until it was hashed."""
        view = buffer.part(size)
        if start > self._done:
            self._skip(start)
        read_into(self._file.fileno(), view, start)
        if start == self._done:
            buffer.readers.append(self._hashing.submit(self._hash.update, view))
            self._done += size
        return view

    def finish(self) -> str:
        """Hash what was not read, and return the sha256 of the whole file."""
        self._skip(self._size)
        return self._hashing.submit(self._hash.hexdigest).result()

    def _skip(self, stop: int) -> None:
        while self._done < stop:
            part = os.pread(self._file.fileno(), min(stop - self._done, _COPIED), self._done)
            if not part:
                raise OSError(f"{self._file.name} became shorter while it was read")
            self._hashing.submit(self._hash.update, part).result()
            self._done += len(part)


class _Output:
    """A file that is written from its first byte to its last."""

    def __init__(
        self, path: Path, *, hashing: ThreadPoolExecutor, writing: ThreadPoolExecutor
    ) -> None:
        self._file = path.open("xb", buffering=0)
        self._hash, self._hashing, self._writing = hashlib.sha256(), hashing, writing

    def write(self, content: memoryview) -> "list[Future[None]]":
        """Append bytes, which must stay as they are until the futures are done."""
        return [
            self._hashing.submit(self._hash.update, content),
            self._writing.submit(self._write, content),
        ]

    def _write(self, content: memoryview) -> None:
        while content:
            content = content[self._file.write(content) :]

    def finish(self) -> "Future[str]":
        """Close the file once all is written, and return its sha256."""
        return self._writing.submit(self._finish)

    def _finish(self) -> str:
        self.close()
        return self._hashing.submit(self._hash.hexdigest).result()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def write_shards(
    shards: Sequence[Shard],
    weights: StoredWeights,
    base: Path,
    folder: Path,
    *,
    written: Callable[[Path], Any] = lambda _: None,
    advance: Callable[[int], None] = lambda _: None,
) -> Streamed:
    """Write the weights of a merged model, and an index where they are several files.

    Args:
        shards: What to write.
        weights: The headers of the base.
        base: Its folder.
        folder: Where to write.
        written: Told of each file that is complete, by another thread.
        advance: Told how many bytes more were written.

    Raises:
        OSError: If reading or writing failed.
    """
    with ExitStack() as stack:
        stack.enter_context(one_thread())
        # Left last, once the threads have ended.
        files: list[_Input | _Output] = []
        stack.callback(lambda: [file.close() for file in files])
        hashing = stack.enter_context(ThreadPoolExecutor(1))
        hashing_output = stack.enter_context(ThreadPoolExecutor(1))
        writing = stack.enter_context(ThreadPoolExecutor(1))
        buffers = deque(_Buffer() for _ in range(_NUM_BUFFERS))
        inputs = {name: _Input(base / name, hashing=hashing) for name in weights.files}
        files += inputs.values()
        hashes: dict[str, Future[str]] = {}
        for shard in shards:
            output = _Output(folder / shard.name, hashing=hashing_output, writing=writing)
            files.append(output)
            metadata = weights.metadata[shard.metadata] or {"format": "pt"}
            entries = [(p.name, p.kind, p.shape, p.num_bytes) for p in shard.pieces]
            for done in output.write(memoryview(header_bytes(entries, metadata))):
                done.result()
            for piece in shard.pieces:
                for size in _write_piece(piece, inputs, output, buffers):
                    advance(size)
            hashes[shard.name] = output.finish()
            writing.submit(written, folder / shard.name)
        for buffer in buffers:
            buffer.wait()
        found = {name: file.finish() for name, file in inputs.items()}
        digests = {name: digest.result() for name, digest in hashes.items()}
    total = sum(piece.num_bytes for shard in shards for piece in shard.pieces)
    if [shard.name for shard in shards] != [WEIGHTS]:
        _write_index(folder / INDEX, shards, {**weights.index, "total_size": total})
    return Streamed(base=found, written=digests, num_bytes=total)


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute in the calling thread alone, and all threads share their memory.

    The products are small, and threads that wait for each other at each of them take the processor
    from those that hash and write. glibc would give each thread a heap of its own, which keeps what
    was freed in it.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _write_piece(
    piece: Piece, inputs: Mapping[str, _Input], output: _Output, buffers: "deque[_Buffer]"
) -> Iterator[int]:
    """Write a tensor in parts, and yield their sizes."""
    change, source = piece.change, piece.source
    if change is None and source is not None and source.kind == piece.kind:
        file = inputs[source.path.name]
        for start in range(0, source.num_bytes, _COPIED):
            size = min(_COPIED, source.num_bytes - start)
            buffer = _next(buffers)
            view = file.read(buffer, size, source.start + start)
            buffer.readers += output.write(view)
            yield size
        return
    for start, stop in _parts(piece.shape):
        rows = _read_rows(piece, start, stop, inputs, buffers)
        new = rows if change is None else change.rows(rows, start, stop)
        buffer = _next(buffers)
        size = new.numel() * DTYPES[piece.kind].itemsize
        view = buffer.part(size)
        torch.frombuffer(view, dtype=DTYPES[piece.kind]).view(new.shape).copy_(new)
        buffer.readers += output.write(view)
        yield size


def _read_rows(
    piece: Piece,
    start: int,
    stop: int,
    inputs: Mapping[str, _Input],
    buffers: "deque[_Buffer]",
) -> torch.Tensor:
    """Return rows of the base as a matrix; zeros where it has none, or they do not matter."""
    width, source = math.prod(piece.shape[1:]), piece.source
    is_needed = piece.change is None or piece.change.reads_old
    if source is None or not is_needed:
        return torch.zeros(1, 1).expand(stop - start, width)
    dtype = DTYPES[source.kind]
    there = min(stop, source.shape[0] if source.shape else 1) - start
    if there <= 0:
        return torch.zeros(stop - start, width, dtype=dtype)
    line = width * dtype.itemsize
    buffer = _next(buffers)
    view = inputs[source.path.name].read(buffer, there * line, source.start + start * line)
    rows = torch.frombuffer(view, dtype=dtype).view(there, width)
    if there == stop - start:
        return rows
    return torch.cat([rows, rows.new_zeros(stop - start - there, width)])


def _next(buffers: "deque[_Buffer]") -> _Buffer:
    """Return the buffer that was used longest ago, once nothing reads it any more."""
    buffers.rotate(-1)
    buffers[0].wait()
    return buffers[0]


def _parts(shape: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield first and last rows of parts that are about equal, of at most `_ELEMENTS` numbers.

    A part of a single row would be multiplied by another kernel than one of several.
    """
    height, width = (shape[0] if shape else 1), math.prod(shape[1:])
    if height * width == 0:
        return
    count = max(1, math.ceil(height / max(1, _ELEMENTS // width)))
    for number in range(count):
        yield height * number // count, height * (number + 1) // count


def _write_index(path: Path, shards: Sequence[Shard], metadata: Mapping[str, Any]) -> None:
    places = {piece.name: shard.name for shard in shards for piece in shard.pieces}
    document = {"metadata": metadata, "weight_map": dict(sorted(places.items()))}
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")

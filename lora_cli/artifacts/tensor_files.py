"""The weights of a model in safetensors files, tensor by tensor, without reading what is not asked.

A file is the length of its header in eight bytes, the header, a JSON object that says of each
tensor its kind of number, its shape and where its bytes are, and these bytes.
"""

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lora_cli.models import weights
from lora_cli.models.weights import INDEX, weight_files

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
"""The kinds of numbers that an update can be added to, by their names in a file."""

NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LENGTH = 8
_METADATA = "__metadata__"


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor in a file.

    Attributes:
        path: The file.
        name: Its name there.
        kind: Its kind of number, as the file calls it; see `DTYPES`.
        shape: Its shape.
        start: Where its first byte is in the file.
        num_bytes: How many there are.
    """

    path: Path
    name: str
    kind: str
    shape: tuple[int, ...]
    start: int
    num_bytes: int

    @property
    def dtype(self) -> torch.dtype | None:
        """Its number format, or None where nothing can be added to it."""
        return DTYPES.get(self.kind)


@dataclass(frozen=True, slots=True)
class StoredWeights:
    """All weight files of a folder.

    Attributes:
        files: Their names, in order.
        tensors: The tensors by name, in the order of the files and of their bytes.
        metadata: What the headers say besides, by file.
        index: What the index says besides; empty without an index.
    """

    files: tuple[str, ...]
    tensors: Mapping[str, Stored]
    metadata: Mapping[str, Mapping[str, str]]
    index: Mapping[str, Any]

    @property
    def num_bytes(self) -> int:
        """The size of all tensors."""
        return sum(tensor.num_bytes for tensor in self.tensors.values())

    @property
    def main_dtype(self) -> torch.dtype:
        """The number format that most of the weights are in; float32 where none has numbers."""
        sizes: dict[torch.dtype, int] = {}
        for tensor in self.tensors.values():
            if tensor.dtype is not None:
                sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + math.prod(tensor.shape)
        return max(sizes, key=sizes.__getitem__, default=torch.float32)


def read_weights(folder: Path) -> StoredWeights:
    """Read the headers of the weight files of a folder.

    Raises:
        ValueError: If a file is damaged, or a tensor is in two of them.
        OSError: If one cannot be read.
    """
    files = weight_files(folder)
    tensors: dict[str, Stored] = {}
    metadata = {}
    for name in files:
        metadata[name], found = read_header(folder / name)
        for tensor in found:
            if tensor.name in tensors:
                raise ValueError(f"{tensor.name} is in {tensors[tensor.name].path.name} and {name}")
            tensors[tensor.name] = tensor
    index = {}
    if (folder / INDEX).is_file() and len(files) > 1:
        index = dict(json.loads((folder / INDEX).read_bytes()).get("metadata") or {})
    return StoredWeights(files, tensors, metadata, index)


def read_header(path: Path) -> tuple[dict[str, str], list[Stored]]:
    """Read what a file says of itself and of its tensors, these in the order of their bytes.

    Raises:
        ValueError: If it is damaged.
        OSError: If it cannot be read.
    """
    metadata, entries = weights.read_header(path)
    tensors = [
        Stored(path, name, entry.kind, entry.shape, entry.start, entry.end - entry.start)
        for name, entry in entries.items()
    ]
    return metadata, sorted(tensors, key=lambda tensor: (tensor.start, tensor.num_bytes))


def read_tensor(stored: Stored) -> torch.Tensor:
    """Read one tensor of a kind in `DTYPES` into memory of its own.

    Raises:
        OSError: If it cannot be read.
    """
    buffer = bytearray(stored.num_bytes)
    with stored.path.open("rb") as file:
        read_into(file.fileno(), memoryview(buffer), stored.start)
    if not buffer:
        return torch.zeros(stored.shape, dtype=DTYPES[stored.kind])
    return torch.frombuffer(buffer, dtype=DTYPES[stored.kind]).view(stored.shape)


def read_into(descriptor: int, buffer: memoryview, start: int) -> None:
    """Fill a buffer from a place in a file, without a memory map.

    Raises:
        OSError: If it cannot be read, or ends before.
    """
    done = 0
    while done < len(buffer):
        count = os.preadv(descriptor, [buffer[done:]], start + done)
        if count == 0:
            raise OSError(f"a file of weights ends at byte {start + done}")
        done += count


def header_bytes(
    tensors: Iterable[tuple[str, str, tuple[int, ...], int]], metadata: Mapping[str, str]
) -> bytes:
    """Return the beginning of a file, up to the first byte of its first tensor.

    Args:
        tensors: Name, kind of number, shape and number of bytes of each, in order.
        metadata: What the file says besides.
    """
    header: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
    place = 0
    for name, kind, shape, size in tensors:
        header[name] = {
            "dtype": kind,
            "shape": list(shape),
            "data_offsets": [place, place + size],
        }
        place += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _LENGTH)
    return len(text).to_bytes(_LENGTH, "little") + text

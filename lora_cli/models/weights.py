"""The weight files of a base model's folder. Does not import torch."""

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_LENGTH = 8
_MAX_HEADER = 100_000_000
# Bytes of a number, by the names of safetensors; those that share a byte are left out.
_WIDTHS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 1),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 2),
    **dict.fromkeys(("I32", "U32", "F32"), 4),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 8),
}


class Entry(NamedTuple):
    """A tensor in a safetensors file: kind of number, shape, first byte and the one behind it."""

    kind: str
    shape: tuple[int, ...]
    start: int
    end: int


def weight_files(folder: Path) -> tuple[str, ...]:
    """Return the names of the weight files, sorted: one, or those that the index lists.

    Raises:
        ValueError: If the index is no index, or names something other than a file in `folder`.
    """
    if (folder / WEIGHTS).is_file():
        return (WEIGHTS,)
    index = json.loads((folder / INDEX).read_bytes())
    mapping = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(mapping, dict) or not mapping:
        raise ValueError("it has no weight_map")
    names = set(mapping.values())
    for name in names:
        if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]*\.safetensors", name):
            raise ValueError(f"it names {name!r}, which is not a plain file name")
    return tuple(sorted(names))


def read_header(path: Path) -> tuple[dict[str, str], dict[str, Entry]]:
    """Read what a safetensors file says of itself and of its tensors, without mapping it.

    Raises:
        ValueError: If it is no whole file of that kind.
        OSError: If it cannot be read.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(_LENGTH), "little")
        if size < _LENGTH or length > min(_MAX_HEADER, size - _LENGTH):
            raise ValueError("its header is cut or too large")
        header = json.loads(file.read(length))
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(x, str) for x in metadata.values()):
        raise ValueError("its metadata are no texts")
    entries = {name: _read_entry(name, entry) for name, entry in header.items()}
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != end:
            raise ValueError(f"{name} does not begin where the tensor before it ends")
        end = entry.end
    first = _LENGTH + length
    if end != size - first:
        raise ValueError(f"its tensors take {end} bytes, and {size - first} are there")
    moved = {n: Entry(e.kind, e.shape, first + e.start, first + e.end) for n, e in entries.items()}
    return metadata, moved


def _read_entry(name: str, entry: Any) -> Entry:
    try:
        kind, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{name} is described in another way") from None
    numbers = [*shape, start, end]
    if not isinstance(kind, str) or not all(type(n) is int and n >= 0 for n in numbers):
        raise ValueError(f"{name} is described in another way")
    width = _WIDTHS.get(kind)
    if start > end or (width is not None and math.prod(shape) * width != end - start):
        raise ValueError(f"{name} has other bytes than its shape asks for")
    return Entry(kind, shape, start, end)


def hash_weights(folder: Path) -> str:
    """Return the sha256 of the weights; see `ModelSource.sha256`."""
    return combine_hashes(hash_weight_files(folder))


def hash_weight_files(folder: Path) -> dict[str, str]:
    """Return the sha256 of each file of weights, by name."""
    return {name: hash_file(folder / name) for name in weight_files(folder)}


def combine_hashes(hashes: Mapping[str, str]) -> str:
    """Return the sha256 of the weights from those of their files; see `ModelSource.sha256`."""
    if list(hashes) == [WEIGHTS]:
        return hashes[WEIGHTS]
    lines = "".join(f"{name} {digest}\n" for name, digest in sorted(hashes.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def hash_file(file: Path) -> str:
    """Return the sha256 of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()

"""The weight files of a base model's folder. Does not import torch."""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


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

"""Which tensors a merged model has, where each comes from, and in which file it will be."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from lora_cli.artifacts.tensor_files import DTYPES, NAMES, Stored, StoredWeights
from lora_cli.lora.updates import Change
from lora_cli.models.weights import WEIGHTS


@dataclass(frozen=True, slots=True)
class Piece:
    """One tensor of the merged model.

    Attributes:
        name: Its name.
        kind: Its kind of number, as files call it.
        shape: Its shape.
        source: The tensor of the base that it was, or None where the base has none.
        change: What becomes of that; None leaves it as it is.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    source: Stored | None
    change: Change | None = None

    @property
    def num_bytes(self) -> int:
        """Its size."""
        if self.source is not None and self.kind == self.source.kind and not self.grows:
            return self.source.num_bytes
        return math.prod(self.shape) * DTYPES[self.kind].itemsize

    @property
    def grows(self) -> bool:
        """Whether it has rows that the base lacks."""
        return self.source is None or self.shape != self.source.shape


@dataclass(frozen=True, slots=True)
class Shard:
    """One file of the merged model.

    Attributes:
        name: Its name.
        pieces: Its tensors, in the order of their bytes.
        metadata: Name of the file of the base whose header it takes over.
    """

    name: str
    pieces: tuple[Piece, ...]
    metadata: str


def untouched(source: Stored, name: str | None = None) -> Piece:
    """Return a tensor that stays as it is, under its own name or another."""
    return Piece(name or source.name, source.kind, source.shape, source)


def changed(source: Stored, change: Change, name: str | None = None) -> Piece:
    """Return a tensor of the base that changes."""
    return replace(untouched(source, name), change=change)


def cast(pieces: Iterable[Piece], dtype: torch.dtype) -> list[Piece]:
    """Return the tensors in another number format, those of integers as they are."""
    return [
        replace(piece, kind=NAMES[dtype]) if piece.kind in DTYPES else piece for piece in pieces
    ]


def arrange(
    pieces: Sequence[Piece], weights: StoredWeights, *, max_bytes: int | None = None
) -> list[Shard]:
    """Put tensors into files: those of the base, or as many as a limit of size asks for.

    A tensor that the base lacks goes into the last file. Within a file the wider numbers come
    first, so that every tensor begins at a multiple of its own width, and then names in order, as
    safetensors writes them.

    Args:
        pieces: The tensors, in the order of the base.
        weights: The base.
        max_bytes: The largest size of the tensors of a file, if the files of the base are not
            wanted; a tensor that is larger has a file of its own.
    """
    groups = _by_file(pieces, weights) if max_bytes is None else _by_size(pieces, max_bytes)
    groups = [group for group in groups if group]
    first = weights.files[0]
    shards = []
    for number, group in enumerate(groups):
        home = next((p.source.path.name for p in group if p.source is not None), first)
        if max_bytes is None and len(weights.files) == len(groups):
            name = weights.files[number]
        else:
            name = f"model-{number + 1:05d}-of-{len(groups):05d}.safetensors"
        ordered = sorted(group, key=lambda piece: (-_width(piece), piece.name))
        shards.append(Shard(name if len(groups) > 1 else WEIGHTS, tuple(ordered), home))
    return shards


def _by_file(pieces: Iterable[Piece], weights: StoredWeights) -> list[list[Piece]]:
    groups: dict[str, list[Piece]] = {name: [] for name in weights.files}
    for piece in pieces:
        home = weights.files[-1] if piece.source is None else piece.source.path.name
        groups[home].append(piece)
    return list(groups.values())


def _by_size(pieces: Iterable[Piece], max_bytes: int) -> list[list[Piece]]:
    groups: list[list[Piece]] = [[]]
    size = 0
    for piece in pieces:
        if groups[-1] and size + piece.num_bytes > max_bytes:
            groups.append([])
            size = 0
        groups[-1].append(piece)
        size += piece.num_bytes
    return groups


def _width(piece: Piece) -> int:
    count = math.prod(piece.shape)
    return piece.num_bytes // count if count else 0

"""Which block of the model a layer is in, by the numbers in module paths.

The block of a layer is the first number in its path that follows the name of a list and has more
behind it: 3 in "bert.encoder.layer.3.attention.self.query". A model may have several lists of
blocks, which are counted each on its own: "encoder.block" and "decoder.block" in T5. Swin
transformers number their stages in this way, not the blocks within a stage.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from lora_cli.errors import Problem

_KEY = "lora.layers"


@dataclass(frozen=True, slots=True)
class Block:
    """Where a layer is.

    Attributes:
        stack: Path of the list of blocks, such as "bert.encoder.layer".
        index: Place in the list, from 0.
    """

    stack: str
    index: int


def block_of(name: str) -> Block | None:
    """Return the block that the layer at path `name` is in, or None for a layer outside of all.

    >>> block_of("bert.encoder.layer.3.attention.self.query")
    Block(stack='bert.encoder.layer', index=3)
    >>> block_of("bert.embeddings.word_embeddings") is None
    True
    """
    parts = name.split(".")
    for place in range(1, len(parts) - 1):
        if _is_number(parts[place]):
            return Block(".".join(parts[:place]), int(parts[place]))
    return None


def stack_depths(names: Iterable[str]) -> dict[str, int]:
    """Return the number of blocks of each list, from paths in all blocks of a model."""
    depths: dict[str, int] = {}
    for name in names:
        block = block_of(name)
        if block is not None:
            depths[block.stack] = max(depths.get(block.stack, 0), block.index + 1)
    return depths


def select_blocks(layers: Sequence[int | str], depth: int) -> frozenset[int]:
    """Return the indices below `depth` that the entries of `lora.layers` mean.

    Args:
        layers: Numbers, negative ones counted from the end; ranges such as "8-11", both ends
            included; "top-4" for the last four.
        depth: Number of blocks.
    """
    indices = {index for entry in layers for index in _indices(entry, depth)}
    return frozenset(index for index in indices if 0 <= index < depth)


def is_selected(name: str, layers: Sequence[int | str], depths: Mapping[str, int]) -> bool:
    """Whether the layer at path `name` is in a block that `layers` means; see `select_blocks`."""
    block = block_of(name)
    return block is not None and block.index in select_blocks(layers, depths[block.stack])


def check_blocks(layers: Sequence[int | str], depths: Mapping[str, int]) -> list[Problem]:
    """Return one problem for each entry of `lora.layers` that means a block which is not there.

    Args:
        layers: See `select_blocks`.
        depths: Number of blocks of each list that holds layers to be adapted; an entry must fit
            one of them.
    """
    if not depths:
        return [
            Problem(
                id="lora.no-such-block",
                message=f"`{_KEY}` must be left out for layers that are in no numbered block, "
                "but is set.",
                key=_KEY,
                fix="leave it out",
            )
        ]
    allowed = " or ".join(f"0 to {depth - 1} ({stack})" for stack, depth in depths.items())
    return [
        Problem(
            id="lora.no-such-block",
            message=f"`{_KEY}` must name blocks that the model has, but {entry} is not there.",
            key=_KEY,
            allowed=allowed,
            fix="count from 0, or from the end with -1 or top-4",
        )
        for entry in layers
        if not any(_fits(entry, depth) for depth in depths.values())
    ]


def in_pattern(name: str, layers: Sequence[int], pattern: Sequence[str]) -> bool:
    """Whether a layer is in one of the blocks that an adapter file from PEFT means.

    Args:
        name: Path of the layer.
        layers: Indices.
        pattern: Names of the lists that count as blocks; empty for any.
    """
    starts = [rf"(?:^|.*?\.){re.escape(stack)}" for stack in pattern] or [r".*?\.[^.]*"]
    for start in starts:
        found = re.match(rf"{start}\.(\d+)\.", name)
        if found:
            return int(found[1]) in layers
    return False


def describe_blocks(names: Iterable[str]) -> str:
    """Say in which blocks layers are: "0-11", "0-2, 5", or by list where there are several.

    >>> describe_blocks(["h.0.attn", "h.1.attn", "h.3.attn"])
    '0-1, 3'
    """
    stacks: dict[str, set[int]] = {}
    outside = False
    for name in names:
        block = block_of(name)
        if block is None:
            outside = True
        else:
            stacks.setdefault(block.stack, set()).add(block.index)
    texts = [f"{_short(stack, stacks)}{_ranges(found)}" for stack, found in stacks.items()]
    return ", ".join(texts + ["outside"] * (outside and bool(texts)))


def _short(stack: str, stacks: Mapping[str, set[int]]) -> str:
    """The part of a path that tells a list from the others; nothing where it is the only one."""
    if len(stacks) == 1:
        return ""
    parts = {path: path.split(".") for path in stacks}
    own = parts[stack]
    shared = 0
    while all(shared < len(p) - 1 and p[shared] == own[shared] for p in parts.values()):
        shared += 1
    return f"{own[shared]} "


def _ranges(indices: Iterable[int]) -> str:
    runs: list[list[int]] = []
    for index in sorted(indices):
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _indices(entry: int | str, depth: int) -> range:
    """The indices of one entry, which may lie outside of the list."""
    if isinstance(entry, int):
        index = entry if entry >= 0 else depth + entry
        return range(index, index + 1)
    first, _, last = entry.partition("-")
    if first == "top":
        return range(depth - int(last), depth)
    return range(int(first), int(last) + 1)


def _fits(entry: int | str, depth: int) -> bool:
    return all(0 <= index < depth for index in _indices(entry, depth))


def _is_number(part: str) -> bool:
    return part.isascii() and part.isdigit()

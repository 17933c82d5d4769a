"""Where the real tokens of a padded batch are, and putting them into one line and back.

Tokens of the longest row come first in the line, so that those of rows of like length are next to
each other. Shapes: B rows of T tokens, N of them real; G rows of a group with E real tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.autograd.function import once_differentiable

# Rows of a group are at least so long, as a share of its longest.
_LIKE = 0.6


@dataclass(frozen=True, slots=True)
class Group:
    """Rows of like length: their numbers, their tokens in the line, and those of their padding.

    Attributes:
        rows: Numbers of the rows.
        tokens: Where their tokens are in the line.
        places: Where these are in the padded rows, of G x `width` places.
        width: Length of the longest.
    """

    rows: torch.Tensor
    tokens: slice
    places: torch.Tensor
    width: int

    def pad(self, line: torch.Tensor) -> torch.Tensor:
        """Return the group's rows (G, width, ...) of a line (N, ...), with zeros at padding."""
        rows = len(self.rows)
        whole: torch.Tensor = _Put.apply(line[self.tokens], self.places, rows * self.width)
        return whole.view(rows, self.width, *line.shape[1:])

    def unpad(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the tokens (E, ...) of the group's rows (G, width, ...)."""
        line: torch.Tensor = _Take.apply(rows.reshape(-1, *rows.shape[2:]), self.places)
        return line


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the real tokens of a batch are.

    Attributes:
        shape: (B, T).
        places: The places of real tokens among B x T, those of the longest row first.
        groups: The rows by length.
        packed: What was put into a line already, by the identity of the tensor.
        masks: Those of the groups, likewise.
    """

    shape: tuple[int, int]
    places: torch.Tensor
    groups: tuple[Group, ...]
    packed: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    masks: dict[int, tuple[torch.Tensor, list[torch.Tensor]]] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """N."""
        return len(self.places)

    def pack(self, x: torch.Tensor) -> torch.Tensor:
        """Put (B, T, ...) into a line, (1, N, ...); a tensor of another shape is left alone."""
        if x.ndim < 2 or x.shape[1] != self.shape[1] or x.shape[0] not in (1, self.shape[0]):
            return x
        if x.requires_grad:
            return self._pack(x)
        if id(x) not in self.packed:
            self.packed[id(x)] = (x, self._pack(x))
        return self.packed[id(x)][1]

    def _pack(self, x: torch.Tensor) -> torch.Tensor:
        whole = x.expand(self.shape[0], *x.shape[1:])
        line: torch.Tensor = _Take.apply(whole.reshape(-1, *x.shape[2:]), self.places)
        return line.unsqueeze(0)

    def unpack(self, line: torch.Tensor) -> torch.Tensor:
        """Undo `pack`, with zeros at padding."""
        rows, width = self.shape
        whole: torch.Tensor = _Put.apply(line.squeeze(0), self.places, rows * width)
        return whole.view(rows, width, *line.shape[2:])

    def masks_of(self, mask: torch.Tensor | None) -> Sequence[torch.Tensor | None]:
        """Return the part of a mask (B or 1, heads or 1, T, T) for each group of rows."""
        if mask is None:
            return [None] * len(self.groups)
        if id(mask) not in self.masks:
            self.masks[id(mask)] = (mask, [_part(mask, group) for group in self.groups])
        return self.masks[id(mask)][1]


def _part(mask: torch.Tensor, group: Group) -> torch.Tensor:
    rows = mask if mask.shape[0] == 1 else mask[group.rows]
    return rows[..., : group.width, : group.width]


class _Take(torch.autograd.Function):
    """Rows of a matrix, each at most once: torch's own way back adds them up one by one."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(places)
        ctx.size = len(x)
        return x.index_select(0, places)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        (places,) = ctx.saved_tensors
        return gradient.new_zeros(ctx.size, *gradient.shape[1:]).index_copy_(
            0, places, gradient
        ), None


class _Put(torch.autograd.Function):
    """The way back from `_Take`: rows at their places, zeros elsewhere."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, places: torch.Tensor, size: int) -> torch.Tensor:
        ctx.save_for_backward(places)
        return x.new_zeros(size, *x.shape[1:]).index_copy_(0, places, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (places,) = ctx.saved_tensors
        return gradient.index_select(0, places), None, None


def layout_of(mask_BT: torch.Tensor) -> Layout | None:
    """Return where real tokens are, or None where there is no padding, or some before a token."""
    rows, width = mask_BT.shape
    lengths_B = mask_BT.long().sum(dim=1)
    real_BT = torch.arange(width, device=mask_BT.device) < lengths_B.unsqueeze(1)
    lengths = lengths_B.tolist()
    is_padded = min(lengths, default=0) < width
    if not is_padded or not lengths or min(lengths) == 0 or not torch.equal(real_BT, mask_BT != 0):
        return None
    ranked = sorted(range(rows), key=lambda row: (-lengths[row], row))
    groups: list[Group] = []
    places: list[torch.Tensor] = []
    start = 0
    while start < rows:
        longest = lengths[ranked[start]]
        own = [row for row in ranked[start:] if lengths[row] >= _LIKE * longest]
        before = sum(map(len, places))
        spans = [torch.arange(lengths[row]) for row in own]
        places += [span + row * width for span, row in zip(spans, own, strict=True)]
        within = torch.cat([span + n * longest for n, span in enumerate(spans)])
        groups.append(
            Group(
                rows=torch.tensor(own, device=mask_BT.device),
                tokens=slice(before, before + len(within)),
                places=within.to(mask_BT.device),
                width=longest,
            )
        )
        start += len(own)
    return Layout((rows, width), torch.cat(places).to(mask_BT.device), tuple(groups))

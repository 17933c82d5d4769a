"""What merging does to one tensor of a file: its new rows, a few at a time.

A tensor is taken as a matrix here, its first axis against all others. Sums are in float32 (float64
where the tensor is) and are rounded by the caller, once. `moves` says how far
the new tensor must move what the old one makes of some inputs, without forming the update: the
other way to the same numbers.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

# Returns by how much new rows make more of the inputs than old ones, shape (rows, inputs), given
# the old rows and where they are.
Moves = Callable[[torch.Tensor, int, int], torch.Tensor]


class Change(ABC):
    """How the rows of one tensor change."""

    reads_old = True
    """Whether the old rows matter."""

    @abstractmethod
    def rows(self, old: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Return the new rows, float32 or wider.

        Args:
            old: The rows as stored, (stop - start, width); anything where `reads_old` is false.
            start: Number of the first row.
            stop: Number of the first row after them.
        """

    @abstractmethod
    def moves(self, x: torch.Tensor) -> Moves:
        """Return what gives ``(new rows - old rows) @ x``, all in the number format of x.

        Args:
            x: Inputs, (width, inputs), float32 or float64.
        """


@dataclass(frozen=True, slots=True)
class LowRank(Change):
    """``W + scale * B A``, or with the transpose of that where W is stored as (in, out).

    Attributes:
        A: Shape (r, in), float32.
        B: Shape (out, r), float32.
        scale: What their product is multiplied by.
        transposed: Whether rows of the tensor are inputs.
    """

    A: torch.Tensor
    B: torch.Tensor
    scale: float
    transposed: bool = False

    def rows(self, old: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Return the new rows."""
        if self.transposed:
            delta = (self.B @ self.A[:, start:stop]).T
        else:
            delta = self.B[start:stop] @ self.A
        delta.mul_(self.scale)
        return old + delta if old.dtype == torch.float64 else delta.add_(old)

    def moves(self, x: torch.Tensor) -> Moves:
        """Return ``scale * B (A x)``."""
        A, B = self.A.to(x.dtype), self.B.to(x.dtype)
        added = (A.T @ (B.T @ x) if self.transposed else B @ (A @ x)) * self.scale
        return lambda _, start, stop: added[start:stop]


@dataclass(frozen=True, slots=True)
class Rescaled(Change):
    """DoRA of a linear layer stored as (out, in): ``m * V / ||V||`` with ``V = W + scale * B A``.

    Attributes:
        A: Shape (r, in), float32.
        B: Shape (out, r), float32.
        scale: What their product is multiplied by.
        magnitude: m, shape (out,), float32.
    """

    A: torch.Tensor
    B: torch.Tensor
    scale: float
    magnitude: torch.Tensor

    def rows(self, old: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Return the new rows; one whose V is zero stays zero."""
        v = LowRank(self.A, self.B, self.scale).rows(old, start, stop)
        norms = torch.linalg.vector_norm(v, dim=1).clamp_min(torch.finfo(v.dtype).tiny)
        return v.mul_((self.magnitude[start:stop] / norms)[:, None])

    def moves(self, x: torch.Tensor) -> Moves:
        """Return ``m / ||V|| * V x - W x``, with ``||V||`` from the products of W, A and B."""
        A, B = self.A.to(x.dtype), self.B.to(x.dtype) * self.scale
        magnitude = self.magnitude.to(x.dtype)
        added, gram = B @ (A @ x), A @ A.T

        def move(old: torch.Tensor, start: int, stop: int) -> torch.Tensor:
            W, b = old.to(x.dtype), B[start:stop]
            squares = W.square().sum(1) + 2 * ((W @ A.T) * b).sum(1) + ((b @ gram) * b).sum(1)
            norms = squares.clamp_min(0).sqrt_().clamp_min(torch.finfo(torch.float32).tiny)
            before = W @ x
            return (magnitude[start:stop] / norms)[:, None] * (before + added[start:stop]) - before

        return move


@dataclass(frozen=True, slots=True)
class Stack(Change):
    """Changes of matrices that are stored one after the other in a tensor of three dimensions.

    Attributes:
        parts: One for each matrix.
        height: Number of rows of a matrix; a row of the tensor is a whole matrix.
    """

    parts: Sequence[Change]
    height: int

    def rows(self, old: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Return the new matrices, flattened."""
        matrices = old.unflatten(1, (self.height, -1))
        parts = self.parts[start:stop]
        changed = [
            part.rows(matrix, 0, self.height) for part, matrix in zip(parts, matrices, strict=True)
        ]
        return torch.stack(changed).flatten(1)

    def moves(self, x: torch.Tensor) -> Moves:
        """Return sums over the rows of a matrix, each with its own part of the inputs."""
        pieces = x.unflatten(0, (self.height, -1))

        def move(old: torch.Tensor, start: int, stop: int) -> torch.Tensor:
            matrices, parts = old.unflatten(1, (self.height, -1)), self.parts[start:stop]
            return torch.stack(
                [
                    _sum_of_rows(part, matrix, pieces)
                    for part, matrix in zip(parts, matrices, strict=True)
                ]
            )

        return move


def _sum_of_rows(part: Change, matrix: torch.Tensor, pieces: torch.Tensor) -> torch.Tensor:
    """Return ``sum_i D[i] x_i`` for the change D of a matrix, (inputs,)."""
    height, width, inputs = pieces.shape
    flat = pieces.permute(1, 0, 2).reshape(width, height * inputs)
    found = part.moves(flat)(matrix, 0, height).unflatten(1, (height, inputs))
    total: torch.Tensor = found.diagonal(dim1=0, dim2=1).sum(-1)
    return total


@dataclass(frozen=True, slots=True)
class Replaced(Change):
    """A tensor that was trained whole.

    Attributes:
        value: What it has become.
    """

    value: torch.Tensor
    reads_old = False

    def rows(self, old: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Return the trained rows."""
        del old
        return _matrix(self.value)[start:stop]

    def moves(self, x: torch.Tensor) -> Moves:
        """Return what the trained rows make of the inputs, less what the old ones do."""
        value = _matrix(self.value)
        return lambda old, start, stop: (value[start:stop].to(x.dtype) - old.to(x.dtype)) @ x


@dataclass(frozen=True, slots=True)
class SomeRows(Change):
    """A table of which some rows were trained.

    Attributes:
        trained: The rows by their numbers.
    """

    trained: Mapping[int, torch.Tensor]

    def rows(self, old: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Return the old rows with the trained ones among them."""
        new = old.to(torch.promote_types(old.dtype, torch.float32), copy=True)
        for number, row in self.trained.items():
            if start <= number < stop:
                new[number - start] = row
        return new

    def moves(self, x: torch.Tensor) -> Moves:
        """Return nothing but for the trained rows."""

        def move(old: torch.Tensor, start: int, stop: int) -> torch.Tensor:
            found = x.new_zeros(stop - start, x.shape[1])
            for number, row in self.trained.items():
                if start <= number < stop:
                    change = row.to(x.dtype) - old[number - start].to(x.dtype)
                    found[number - start] = change @ x
            return found

        return move


def _matrix(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor as a matrix, its first axis against all others."""
    return tensor.reshape(tensor.shape[0], -1) if tensor.ndim else tensor.reshape(1, 1)

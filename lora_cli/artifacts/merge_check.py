r"""Whether the tensors of a merged model say what base and update say, tensor by tensor.

Random inputs of -1 and 1 go through what the rows of a merged tensor, read back from its file, have
more than those of the base, and through the update. Rounding moves each weight w by at most
``u |w|``, with u half a unit in the last place of the number format. The moves that a row adds up
have signs of their own for each input, so that (Hoeffding) an output is farther off than
``8 u ||W||`` once in 10^13 times. The mean square over all outputs of a tensor is at most
``u^2 ||W||^2``: that tells of an update which was lost or applied twice, unless it is smaller than
what rounding does.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from lora_cli.artifacts.merge_plan import Piece
from lora_cli.artifacts.tensor_files import DTYPES, Stored, read_into

_INPUTS = 2
_ELEMENTS = 2**19
# Of one output, in units of what rounding may do to the weights of its row together.
_MOST = 8.0
# Of all outputs of a tensor, whose mean square is below 1 in these units, but for chance.
_MEAN = 1.5
# What is left of sums in float32, in which the update is formed.
_SUMS = 2.0**-20


@dataclass(frozen=True, slots=True)
class TensorCheck:
    """How far a merged tensor is from what it should compute.

    Attributes:
        name: The tensor.
        largest: The largest difference of an output, in units of what rounding explains.
        mean: The same of the root of the mean square.
        kept: Share of the update that reached the merged weights after rounding: 1 for all of it.
            None where nothing was updated.
    """

    name: str
    largest: float
    mean: float
    kept: float | None

    @property
    def passed(self) -> bool:
        """Whether rounding explains the difference."""
        return self.largest <= 1 and self.mean <= 1


@dataclass(slots=True)
class _Sums:
    """What is added up over the rows of a tensor."""

    largest: float = 0.0
    squares: float = 0.0
    allowed: float = 0.0
    arrived: float = 0.0
    wanted: float = 0.0


def check_tensor(piece: Piece, merged: Stored, *, seed: int) -> TensorCheck:
    """Compare a tensor that was written with the base and the update.

    Args:
        piece: What was to be written; it has a change.
        merged: What is there.
        seed: Decides the inputs.

    Raises:
        OSError: If a file cannot be read.
    """
    if piece.change is None:
        raise ValueError(f"{piece.name} must have a change to be checked, but has none.")
    if merged.kind != piece.kind or merged.shape != piece.shape:
        return TensorCheck(piece.name, math.inf, math.inf, None)
    height, width = (piece.shape[0] if piece.shape else 1), math.prod(piece.shape[1:])
    generator = torch.Generator().manual_seed(seed)
    sums, dtype = _Sums(), DTYPES[piece.kind]
    # What float32 does to a sum is seen only beside weights that are as exact.
    wide = torch.float32 if dtype.itemsize == 2 else torch.float64
    x = torch.randint(0, 2, (width, _INPUTS), generator=generator).to(wide) * 2 - 1
    move = piece.change.moves(x)
    columns = x.T.contiguous()
    step = max(1, _ELEMENTS // max(1, width))
    for start in range(0, height, step):
        stop = min(height, start + step)
        new = _rows(merged, start, stop, width).to(wide)
        old = _old_rows(piece, start, stop, width).to(wide)
        lengths = torch.linalg.vector_norm(new, dim=1, keepdim=True)
        update, moved = move(old, start, stop), new.sub_(old)
        # Two products with a vector are faster than one with a matrix of two columns.
        found = torch.stack([moved @ column for column in columns], dim=1)
        _add(sums, lengths, update, found, dtype, width)
    mean = math.sqrt(sums.squares / sums.allowed) / _MEAN if sums.allowed else 0.0
    kept = sums.arrived / sums.wanted if sums.wanted else None
    return TensorCheck(piece.name, sums.largest / _MOST, mean, kept)


def _add(
    sums: _Sums,
    lengths: torch.Tensor,
    update: torch.Tensor,
    found: torch.Tensor,
    dtype: torch.dtype,
    width: int,
) -> None:
    """Add what some rows say.

    Args:
        sums: What is added to, in place.
        lengths: Of the merged rows, (rows, 1).
        update: What the update makes of the inputs, (rows, inputs).
        found: What the merged rows make more of them than the old ones.
        dtype: Number format of the merged rows.
        width: How many numbers a row has.
    """
    info = torch.finfo(dtype)
    # Below the smallest normal number the steps are all of one size.
    least = math.sqrt(width) * info.smallest_normal * info.eps
    allowed = (info.eps / 2 + _SUMS) * lengths + least
    # The update itself is a sum in float32, and may be far larger than what it leads to.
    allowed = (allowed + update.abs() * _SUMS).clamp_min_(torch.finfo(found.dtype).tiny)
    gap = (found - update).abs().nan_to_num(nan=math.inf)
    if gap.numel():
        sums.largest = max(sums.largest, float((gap / allowed).max()))
    sums.squares += float(gap.double().square().sum())
    sums.allowed += float(allowed.double().square().sum())
    sums.arrived += float((found * update).double().sum())
    sums.wanted += float(update.double().square().sum())


def _rows(stored: Stored, start: int, stop: int, width: int) -> torch.Tensor:
    dtype = DTYPES[stored.kind]
    line = width * dtype.itemsize
    buffer = bytearray((stop - start) * line)
    with stored.path.open("rb") as file:
        read_into(file.fileno(), memoryview(buffer), stored.start + start * line)
    if not buffer:
        return torch.zeros(stop - start, width, dtype=dtype)
    return torch.frombuffer(buffer, dtype=dtype).view(stop - start, width)


def _old_rows(piece: Piece, start: int, stop: int, width: int) -> torch.Tensor:
    """Return rows of the base, zeros where it has none."""
    source = piece.source
    height = 0 if source is None else (source.shape[0] if source.shape else 1)
    there = min(stop, height)
    same = source is not None and source.shape[1:] == piece.shape[1:]
    if source is None or there <= start or not same:
        return torch.zeros(stop - start, width)
    rows = _rows(source, start, there, width)
    missing = stop - max(start, there)
    return torch.cat([rows, rows.new_zeros(missing, width)]) if missing else rows


def worst(checks: Iterable[TensorCheck]) -> TensorCheck | None:
    """Return the check that is nearest to failing, or failed most."""
    return max(checks, key=lambda check: max(check.largest, check.mean), default=None)

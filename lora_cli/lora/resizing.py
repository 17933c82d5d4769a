"""An update of one rank, written with another.

More rank is zeros below A and beside B: the product is the same. For less, ``B A = U S V^T`` is cut
after its first r singular values, which no other matrix of rank r is closer than (Eckart and Young
1936). It is never formed: with ``B = Q_B R_B`` and ``A^T = Q_A R_A``, the singular values are those
of ``R_B R_A^T``, which is as small as the rank, and ``U = Q_B U'``, ``V = Q_A V'``.
"""

from dataclasses import dataclass, replace

import torch

from lora_cli.lora.factors import Factors


@dataclass(frozen=True, kw_only=True, slots=True)
class Resized:
    """An update in another rank.

    Attributes:
        factors: The new factors, of the same scale and number format.
        kept: Squared length of the new ``B A``.
        whole: Squared length of the old one.
    """

    factors: Factors
    kept: float
    whole: float

    @property
    def energy(self) -> float:
        """Share of the squared length that is kept; 1 for an update of nothing."""
        return self.kept / self.whole if self.whole else 1.0


def resize_factors(factors: Factors, r: int) -> Resized:
    """Return an update in rank `r`: the same where that is not smaller, else the closest.

    Args:
        factors: Of a layer without groups of channels, or of any where `r` is its rank.
        r: At least 1.

    Raises:
        ValueError: If the channels of a convolution are in groups, each with its own factors.
    """
    if r != factors.r and factors.groups != 1:
        raise ValueError("The update of a convolution in groups must keep its rank.")
    if r >= factors.r:
        whole = _square(factors)
        return Resized(factors=_padded(factors, r), kept=whole, whole=whole)
    A, B = factors.A.double().flatten(1), factors.B.double().flatten(1)
    q_b, r_b = torch.linalg.qr(B)
    q_a, r_a = torch.linalg.qr(A.mT)
    u, s, vh = torch.linalg.svd(r_b @ r_a.mT, full_matrices=False)
    root = s[:r].sqrt()
    new_a = (root[:, None] * (vh[:r] @ q_a.mT)).to(factors.A.dtype)
    new_b = ((q_b @ u[:, :r]) * root).to(factors.B.dtype)
    cut = replace(
        factors,
        A=new_a.reshape(-1, *factors.A.shape[1:]).contiguous(),
        B=new_b.reshape(-1, len(root), *factors.B.shape[2:]).contiguous(),
    )
    squares = s.square()
    # A layer may be smaller than the rank that is asked for.
    return Resized(
        factors=_padded(cut, r), kept=float(squares[:r].sum()), whole=float(squares.sum())
    )


def _square(factors: Factors) -> float:
    """Return ``||B A||^2 = sum of (B^T B) * (A A^T)``; groups are blocks of B."""
    A, B = factors.A.double().flatten(1), factors.B.double().flatten(1)
    if factors.groups != 1:
        B = torch.block_diag(*B.chunk(factors.groups))
    return float(((B.mT @ B) * (A @ A.mT)).sum())


def _padded(factors: Factors, r: int) -> Factors:
    A, B, more = factors.A, factors.B, r - factors.r
    if not more:
        return factors
    return replace(
        factors,
        A=torch.cat([A, A.new_zeros(more, *A.shape[1:])]),
        B=torch.cat([B, B.new_zeros(B.shape[0], more, *B.shape[2:])], dim=1),
    )

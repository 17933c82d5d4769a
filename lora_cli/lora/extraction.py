"""What turned one checkpoint into another, as the low-rank update that comes closest to it.

For a layer with weights W before and W' after, ``D = W' - W = U S V^T``, and the best update of
rank r is ``U_r S_r V_r^T`` (Eckart and Young 1936): B = U_r sqrt(S_r), A = sqrt(S_r) V_r^T, with a
factor of 1. Its energy is ``sum of s_i^2, i <= r``, out of ``||D||^2 = sum of all s_i^2``.
"""

from dataclasses import dataclass

import torch

# Of layers whose smaller side is beyond it, only the first singular values are computed
# (Halko, Martinsson and Tropp 2011, algorithm 4.4), with some more than are kept.
_EXACT_SIZE = 2048
_MORE, _ITERATIONS = 16, 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Extracted:
    """The update of one layer.

    Attributes:
        A: (r, in_features), float32.
        B: (out_features, r), float32.
        kept: Squared length of ``B A``.
        whole: Squared length of the difference.
    """

    A: torch.Tensor
    B: torch.Tensor
    kept: float
    whole: float


def extract_update(before: torch.Tensor, after: torch.Tensor, r: int) -> Extracted:
    """Return the update of rank `r`, or less where the layer is smaller, that comes closest.

    Args:
        before: Weight (out_features, in_features).
        after: Of the same shape.
        r: Rank, at least 1.
    """
    difference = after.detach().float() - before.detach().float()
    r = min(r, *difference.shape)
    if min(difference.shape) <= _EXACT_SIZE:
        u, s, vh = torch.linalg.svd(difference, full_matrices=False)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            size = min(r + _MORE, *difference.shape)
            u, s, v = torch.svd_lowrank(difference, q=size, niter=_ITERATIONS)
        vh = v.mT
    root = s[:r].sqrt()
    return Extracted(
        A=(root[:, None] * vh[:r]).contiguous(),
        B=(u[:, :r] * root).contiguous(),
        kept=float(s[:r].double().square().sum()),
        whole=float(difference.double().square().sum()),
    )

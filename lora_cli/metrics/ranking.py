"""Scores of ranked candidates, per user and over all rows, as the usual libraries define them.

A group is what is ranked together: the scores of a user's candidates and whether each was clicked,
two arrays of shape (N,). Equal scores never help: a candidate that was not clicked counts as ranked
before one that was with the same score, and `ndcg` takes the mean over their orders.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Scores = NDArray[np.float64]
Flags = NDArray[np.bool_]
Group = tuple[Scores, Flags]


def ranking_metrics(groups: Sequence[Group], *, k: int) -> dict[str, float]:
    """Return ``auc``, ``ndcg``, ``hit_rate``, ``mrr`` and ``auc_all``.

    ``auc`` is the mean over the groups with clicked and other candidates, ``auc_all`` that of all
    candidates as one group; both are 0.5, which says nothing, where there is nothing to compare.
    The others are means over the groups with a clicked candidate, 0 without any: ``ndcg`` and
    ``hit_rate`` (whether one is among the first) of the first `k`, ``mrr`` 1 / the place of the
    first that was clicked.
    """
    mixed = [group for group in groups if group[1].any() and not group[1].all()]
    clicked = [group for group in groups if group[1].any()]
    places = [first_place(*group) for group in clicked]
    return {
        "auc": _mean([auc(*group) for group in mixed], empty=0.5),
        "ndcg": _mean([ndcg(*group, k=k) for group in clicked]),
        "hit_rate": _mean([float(place <= k) for place in places]),
        "mrr": _mean([1 / place for place in places]),
        "auc_all": _auc_of_all(groups),
    }


def auc(scores: Scores, clicked: Flags) -> float:
    """Return the chance that a clicked candidate is scored above another; ties count half.

    >>> auc(np.array([0.9, 0.1, 0.5]), np.array([True, False, False]))
    1.0
    """
    others = np.sort(scores[~clicked])
    below = np.searchsorted(others, scores[clicked], side="left")
    not_above = np.searchsorted(others, scores[clicked], side="right")
    return float((below + not_above).mean() / (2 * len(others)))


def ndcg(scores: Scores, clicked: Flags, *, k: int) -> float:
    """Return DCG@k / the largest DCG@k there can be, for gains of 1 and 0.

    DCG is the sum of gain / log2(1 + place) over the first `k` places. Candidates of equal score
    share the mean discount of their places.
    """
    discounts = 1 / np.log2(np.arange(2, len(scores) + 2))
    discounts[k:] = 0
    _, place, counts = np.unique(-scores, return_inverse=True, return_counts=True)
    sums = np.concatenate([[0.0], discounts.cumsum()])
    ends = counts.cumsum()
    shared = (sums[ends] - sums[ends - counts]) / counts
    return float(shared[place][clicked].sum() / sums[int(clicked.sum())])


def first_place(scores: Scores, clicked: Flags) -> int:
    """Return the place, from 1, of the first clicked candidate, behind others of its score.

    >>> first_place(np.array([0.9, 0.5, 0.5]), np.array([False, True, False]))
    3
    """
    return 1 + int((scores[~clicked] >= scores[clicked].max()).sum())


def _auc_of_all(groups: Sequence[Group]) -> float:
    if not groups:
        return 0.5
    scores, clicked = (np.concatenate(parts) for parts in zip(*groups, strict=True))
    return 0.5 if clicked.all() or not clicked.any() else auc(scores, clicked)


def _mean(values: Sequence[float], *, empty: float = 0.0) -> float:
    return float(np.mean(values)) if values else empty

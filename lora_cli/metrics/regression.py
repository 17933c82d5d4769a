"""Scores of predicted numbers."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def regression_metrics(
    predictions: Sequence[float], references: Sequence[float]
) -> dict[str, float]:
    """Return ``pearson``, ``spearman`` and ``mse``.

    Pearson's correlation, that of the ranks (ties share their mean rank), and the mean of the
    squared differences. A correlation is 0 where predictions or references are constant, since
    they say nothing about each other then; all are 0 for no rows.
    """
    predicted = np.asarray(predictions, dtype=np.float64)
    actual = np.asarray(references, dtype=np.float64)
    if not len(predicted):
        return {"pearson": 0.0, "spearman": 0.0, "mse": 0.0}
    return {
        "pearson": _correlation(predicted, actual),
        "spearman": _correlation(_ranks(predicted), _ranks(actual)),
        "mse": float(np.square(predicted - actual).mean()),
    }


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the rank of each value from 1; equal values have the mean of their ranks."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum()
    mean_rank: NDArray[np.float64] = (last - (counts - 1) / 2)[place]
    return mean_rank


def _correlation(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    first, second = first - first.mean(), second - second.mean()
    size = float(np.linalg.norm(first) * np.linalg.norm(second))
    return float(first @ second) / size if size else 0.0

"""Scores of rows that have any number of labels, as the usual libraries define them.

N is the number of rows, C that of labels; `predicted` and `actual` are of shape (N, C), true where
a row is given, or has, a label.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_cli.metrics.classification import class_scores, ratio

Flags = NDArray[np.bool_]


def multi_label_metrics(predicted: Flags, actual: Flags) -> dict[str, float]:
    """Return ``micro_f1``, ``macro_f1`` and ``exact_match``.

    With true positives TP, false positives FP and false negatives FN, F1 = 2 TP / (2 TP + FP +
    FN), 0 where undefined: of the sums over labels (micro), and the mean over labels (macro).
    ``exact_match`` is the share of rows all of whose labels are right.
    """
    hits, given, there = _counts(predicted, actual)
    same = (predicted == actual).all(axis=1)
    return {
        "micro_f1": float(ratio(2 * hits.sum(), given.sum() + there.sum())),
        "macro_f1": float(ratio(2 * hits, given + there).mean()),
        "exact_match": float(same.mean()) if len(same) else 0.0,
    }


def multi_label_report(predicted: Flags, actual: Flags) -> dict[str, Any]:
    """Return the `class_scores` of each label."""
    return class_scores(*_counts(predicted, actual))


def _counts(predicted: Flags, actual: Flags) -> tuple[NDArray[np.int64], ...]:
    """Return true positives, predictions and occurrences of each label."""
    hits = (predicted & actual).sum(axis=0)
    return hits, predicted.sum(axis=0), actual.sum(axis=0)

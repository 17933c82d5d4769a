"""Scores of predicted classes, computed from one confusion matrix.

Importing this module imports `evaluate`, which takes seconds: import it where it is used.

C is the number of classes; predictions and references are class indices below C.
"""

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import numpy as np
from numpy.typing import NDArray

Counts = NDArray[np.int64]


def confusion_matrix(
    predictions: Sequence[int], references: Sequence[int], num_classes: int
) -> Counts:
    """Return the (C, C) counts: row is the reference, column the prediction.

    Raises:
        ValueError: If the two differ in length, or an index is not in [0, C).
    """
    predicted = np.asarray(predictions, dtype=np.int64)
    actual = np.asarray(references, dtype=np.int64)
    if predicted.shape != actual.shape or predicted.ndim != 1:
        raise ValueError(
            f"predictions and references must be two lists of one length, but have shapes "
            f"{predicted.shape} and {actual.shape}."
        )
    both = np.concatenate([predicted, actual])
    if both.size and (both.min() < 0 or both.max() >= num_classes):
        raise ValueError(f"class indices must be in [0, {num_classes}), but are not.")
    cells = np.bincount(actual * num_classes + predicted, minlength=num_classes**2)
    return cells.reshape(num_classes, num_classes)


def ratio(
    numerator: NDArray[np.float64] | Counts, denominator: NDArray[np.float64] | Counts
) -> NDArray[np.float64]:
    """Divide, with 0 where the denominator is 0."""
    result = np.zeros(np.shape(numerator))
    np.divide(numerator, denominator, out=result, where=np.asarray(denominator) != 0)
    return result


def class_report(
    predictions: Sequence[int], references: Sequence[int], num_classes: int
) -> dict[str, Any]:
    """Return the `class_scores` of predicted classes."""
    counts = confusion_matrix(predictions, references, num_classes)
    return exclusive_scores(np.diag(counts), counts.sum(axis=0), counts.sum(axis=1))


def exclusive_scores(hits: Counts, predicted: Counts, actual: Counts) -> dict[str, Any]:
    """Return `class_scores` of classes of which each row has one.

    The macro averages are over the classes that are there or predicted, as those of scikit-learn.
    """
    scores = class_scores(hits, predicted, actual)
    met = np.flatnonzero(predicted + actual)
    known = class_scores(hits[met], predicted[met], actual[met])
    return {**scores, "macro": known["macro"]}


def class_scores(hits: Counts, predicted: Counts, actual: Counts) -> dict[str, Any]:
    """Return precision, recall, F1 and support of each class, and their averages.

    A ratio whose denominator is 0 counts as 0, and a class without rows counts in the macro
    average.

    Args:
        hits: Number of true positives of each class, shape (C,).
        predicted: How often each was predicted.
        actual: How often each is there.

    Returns:
        ``classes``, a list by class index of dicts with precision, recall, f1 and support;
        ``macro`` (plain mean over classes) and ``weighted`` (mean weighted by support), dicts of
        the same kind whose support is the total.
    """
    table = {
        "precision": ratio(hits, predicted),
        "recall": ratio(hits, actual),
        # Equals the harmonic mean of both.
        "f1": ratio(2 * hits, predicted + actual),
    }
    total = int(actual.sum())
    weights = ratio(actual, np.full(len(actual), total))
    return {
        "classes": [
            {name: float(values[index]) for name, values in table.items()}
            | {"support": int(actual[index])}
            for index in range(len(actual))
        ],
        "macro": {name: _mean(v) for name, v in table.items()} | {"support": total},
        "weighted": {name: float(v @ weights) for name, v in table.items()} | {"support": total},
    }


def _mean(values: NDArray[np.float64]) -> float:
    return float(values.mean()) if values.size else 0.0


class _ClassMetric(evaluate.Metric):  # type: ignore[misc]  # evaluate has no types
    """A metric over class indices that keeps its rows in memory and fetches nothing."""

    summary = ""

    def __init__(self) -> None:
        super().__init__(keep_in_memory=True)

    def _build_data_dir(self) -> str:
        # The base class makes a cache folder even if everything is kept in memory.
        return ""

    def _info(self) -> evaluate.MetricInfo:
        features = {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
        return evaluate.MetricInfo(
            description=self.summary,
            citation="",
            inputs_description="predictions and references: class indices, one a row",
            features=datasets.Features(features),
        )


class Accuracy(_ClassMetric):
    """Share of rows whose prediction is the reference; 0 for no rows."""

    summary = "Share of rows whose prediction is the reference."

    def _compute(
        self, *, predictions: Sequence[int], references: Sequence[int], num_classes: int
    ) -> dict[str, float]:
        counts = confusion_matrix(predictions, references, num_classes)
        return {"accuracy": float(ratio(np.trace(counts), counts.sum()))}


class MacroF1(_ClassMetric):
    """Mean of F1 = 2 TP / (2 TP + FP + FN) over the classes that are there or predicted."""

    summary = "Mean over the classes that occur of the harmonic mean of precision and recall."

    def _compute(
        self, *, predictions: Sequence[int], references: Sequence[int], num_classes: int
    ) -> dict[str, float]:
        counts = confusion_matrix(predictions, references, num_classes)
        scores = exclusive_scores(np.diag(counts), counts.sum(axis=0), counts.sum(axis=1))
        return {"macro_f1": scores["macro"]["f1"]}


class MatthewsCorrelation(_ClassMetric):
    r"""Correlation of predicted and actual classes, in [-1, 1]; 0 where either is constant.

    With s rows, c hits, and p and t the rows predicted as and belonging to each class (Gorodkin
    2004, "Comparing two K-category assignments by a K-category correlation coefficient")::

        (c s - p.t) / sqrt((s^2 - p.p) (s^2 - t.t))
    """

    summary = "Correlation of predicted and actual classes."

    def _compute(
        self, *, predictions: Sequence[int], references: Sequence[int], num_classes: int
    ) -> dict[str, float]:
        counts = confusion_matrix(predictions, references, num_classes).astype(np.float64)
        predicted, actual = counts.sum(axis=0), counts.sum(axis=1)
        rows = counts.sum()
        covariance = np.trace(counts) * rows - predicted @ actual
        spread = np.sqrt((rows**2 - predicted @ predicted) * (rows**2 - actual @ actual))
        return {"matthews_correlation": float(ratio(covariance, spread))}


METRICS: dict[str, type[_ClassMetric]] = {
    "accuracy": Accuracy,
    "macro_f1": MacroF1,
    "matthews_correlation": MatthewsCorrelation,
}
"""Metric by the name under which `compute(...)` returns its value."""


def classification_metrics(
    predictions: Sequence[int], references: Sequence[int], *, num_classes: int
) -> dict[str, float]:
    """Return the value of every metric in `METRICS` by name."""
    found: dict[str, float] = {}
    for metric in METRICS.values():
        found |= metric().compute(
            predictions=predictions, references=references, num_classes=num_classes
        )
    return found

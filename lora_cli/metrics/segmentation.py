"""Scores of the classes of pixels, from how often each is hit, predicted and there.

C is the number of classes. Pixels without a class are counted nowhere.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_cli.metrics.classification import Counts, exclusive_scores, ratio


def segmentation_metrics(counts: Counts) -> dict[str, float]:
    """Return ``mean_iou`` and ``pixel_accuracy``; 0 where there are no pixels.

    The intersection over union of a class is ``hits / (predicted + actual - hits)``, over all
    pixels of all images; the mean is over the classes that are there or predicted.

    Args:
        counts: Pixels that are hit, predicted and there, shape (3, C).
    """
    hits, _, actual = counts
    union = _union(counts)
    met = union > 0
    return {
        "mean_iou": float(_iou(counts)[met].mean()) if met.any() else 0.0,
        "pixel_accuracy": float(ratio(hits.sum(), actual.sum())),
    }


def segmentation_report(counts: Counts) -> dict[str, Any]:
    """Return the scores of `exclusive_scores`, with the ``iou`` of each class beside them."""
    found = exclusive_scores(*counts)
    iou, actual = _iou(counts), counts[2]
    for scores, value in zip(found["classes"], iou.tolist(), strict=True):
        scores["iou"] = value
    mean = segmentation_metrics(counts)["mean_iou"]
    weights = ratio(actual, np.full(len(actual), actual.sum()))
    found["macro"]["iou"], found["weighted"]["iou"] = mean, float(iou @ weights)
    return found


def _union(counts: Counts) -> Counts:
    found: Counts = counts[1] + counts[2] - counts[0]
    return found


def _iou(counts: Counts) -> NDArray[np.float64]:
    return ratio(counts[0], _union(counts))

"""Average precision of boxes, as pycocotools computes it for COCO.

The average precision of a class is the mean precision over 101 values of recall, of boxes that
overlap one that is there by at least a share (intersection over union); at most the 100 surest
boxes of an image count.
"""

from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from typing import Any

import numpy as np
from numpy.typing import NDArray

MOST_BOXES = 100
"""Boxes of an image that count."""


@dataclass(frozen=True, slots=True)
class Boxes:
    """Boxes in one image.

    Attributes:
        corners: (left, top, right, bottom) in pixels, shape (N, 4).
        labels: Their classes, shape (N,).
        scores: How sure they are, shape (N,); 1 for those that are there.
    """

    corners: NDArray[np.float32]
    labels: NDArray[np.int64]
    scores: NDArray[np.float32]

    @property
    def sides(self) -> list[list[float]]:
        """Left, top, width and height of each."""
        corners = self.corners.astype(np.float64)
        sides: list[list[float]] = np.concatenate(
            [corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1
        ).tolist()
        return sides


def detection_metrics(found: Sequence[Boxes], true: Sequence[Boxes], classes: int) -> Any:
    """Return ``map``, the mean over shares of .5, .55, ... .95, and ``map_50``, for .5 alone.

    Both are means over the classes that are there, and 0 where none is.
    """
    precision_TC = _precision(found, true, classes)
    has_boxes = precision_TC[0] >= 0
    if not has_boxes.any():
        return {"map": 0.0, "map_50": 0.0}
    return {
        "map": float(precision_TC[:, has_boxes].mean()),
        "map_50": float(precision_TC[0, has_boxes].mean()),
    }


def detection_report(found: Sequence[Boxes], true: Sequence[Boxes], classes: int) -> Any:
    """Return ``classes``, the ``ap``, ``ap_50`` and ``support`` of each, and their averages.

    A class that is not there has 0, and does not count in the averages.
    """
    precision_TC = _precision(found, true, classes).clip(min=0)
    labels = np.concatenate([np.zeros(0, np.int64), *(boxes.labels for boxes in true)])
    support = np.bincount(labels, minlength=classes)
    scores = np.stack([precision_TC.mean(axis=0), precision_TC[0]], axis=1)
    lines = [
        {"ap": ap, "ap_50": ap_50, "support": count}
        for (ap, ap_50), count in zip(scores.tolist(), support.tolist(), strict=True)
    ]
    averages = {}
    for name, weights in (("macro", support > 0), ("weighted", support)):
        ap, ap_50 = (weights @ scores / max(1, weights.sum())).tolist()
        averages[name] = {"ap": ap, "ap_50": ap_50, "support": int(support.sum())}
    return {"classes": lines, **averages}


def _precision(found: Sequence[Boxes], true: Sequence[Boxes], classes: int) -> Any:
    """Return the average precision by overlap and class, shape (10, C); -1 without boxes there."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with redirect_stdout(StringIO()):
        sides = []
        for images in (true, found):
            entries = [
                {"image_id": image, "bbox": box, "category_id": label, "score": score, "iscrowd": 0}
                for image, boxes in enumerate(images)
                for box, label, score in zip(
                    boxes.sides, boxes.labels.tolist(), boxes.scores.tolist(), strict=True
                )
            ]
            for number, entry in enumerate(entries, start=1):
                entry |= {"id": number, "area": entry["bbox"][2] * entry["bbox"][3]}
            data = COCO()
            data.dataset = {
                "images": [{"id": image} for image in range(len(true))],
                "categories": [{"id": label} for label in range(classes)],
                "annotations": entries,
            }
            data.createIndex()
            sides.append(data)
        evaluation = COCOeval(*sides, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
    # By overlap, recall, class, size of the box and number of boxes; all sizes, and the most.
    return evaluation.eval["precision"][:, :, :, 0, -1].mean(axis=1)

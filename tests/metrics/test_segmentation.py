"""Scores of pixels, beside scikit-learn."""

import numpy as np
import pytest
from sklearn import metrics

from lora_cli.metrics.segmentation import segmentation_metrics, segmentation_report

CLASSES = 6


@pytest.fixture(scope="module")
def pixels() -> tuple[np.ndarray, np.ndarray]:
    """Found and true classes; 4 is never there nor found, 5 is found alone."""
    draw = np.random.default_rng(0)
    true = draw.integers(0, 4, 500)
    found = np.where(draw.random(500) < 0.6, true, draw.choice([0, 1, 2, 3, 5], 500))
    return found, true


def counts_of(found: np.ndarray, true: np.ndarray) -> np.ndarray:
    table = metrics.confusion_matrix(true, found, labels=range(CLASSES))
    return np.stack([np.diag(table), table.sum(0), table.sum(1)])


def test_scores_are_those_of_scikit_learn(pixels: tuple[np.ndarray, np.ndarray]) -> None:
    found, true = pixels
    scores = segmentation_metrics(counts_of(found, true))
    met = [0, 1, 2, 3, 5]
    mean = metrics.jaccard_score(true, found, labels=met, average="macro", zero_division=0)
    assert scores["mean_iou"] == pytest.approx(mean)
    assert scores["pixel_accuracy"] == metrics.accuracy_score(true, found)


def test_the_report_has_the_iou_of_each_class(pixels: tuple[np.ndarray, np.ndarray]) -> None:
    found, true = pixels
    report = segmentation_report(counts_of(found, true))
    each = metrics.jaccard_score(true, found, labels=range(CLASSES), average=None, zero_division=0)
    assert [scores["iou"] for scores in report["classes"]] == pytest.approx(each)
    weighted = metrics.jaccard_score(true, found, average="weighted", zero_division=0)
    assert report["weighted"]["iou"] == pytest.approx(weighted)
    recall = metrics.recall_score(true, found, labels=[1], average=None)
    assert report["classes"][1]["recall"] == pytest.approx(recall[0])


def test_without_pixels_all_is_zero() -> None:
    none = np.zeros((3, 2), np.int64)
    assert segmentation_metrics(none) == {"mean_iou": 0.0, "pixel_accuracy": 0.0}
    assert segmentation_report(none)["macro"]["iou"] == 0.0

"""Average precision, by hand and as pycocotools prints it."""

from typing import Any

import numpy as np
import pytest

from lora_cli.metrics.detection import Boxes, detection_metrics, detection_report


def boxes(*corners: tuple[float, ...], labels: list[int], scores: Any = None) -> Boxes:
    return Boxes(
        np.array(corners, np.float32).reshape(-1, 4),
        np.array(labels, np.int64),
        np.array(scores or [1.0] * len(labels), np.float32),
    )


NONE = boxes(labels=[])
ONE = boxes((0, 0, 10, 10), labels=[0])


def test_boxes_as_they_are_have_one() -> None:
    scores = detection_metrics([ONE, NONE], [ONE, NONE], 2)
    assert scores == pytest.approx({"map": 1.0, "map_50": 1.0})


def test_an_overlap_of_six_tenths_counts_for_three_shares() -> None:
    found = boxes((0, 0, 10, 6.2), labels=[0])
    scores = detection_metrics([found], [ONE], 1)
    # 0.5, 0.55 and 0.6 of ten.
    assert scores == pytest.approx({"map": 0.3, "map_50": 1.0})


def test_a_surer_box_beside_it_halves_the_precision() -> None:
    found = boxes((0, 0, 10, 10), (40, 40, 50, 50), labels=[0, 0], scores=[0.4, 0.9])
    assert detection_metrics([found], [ONE], 1)["map"] == pytest.approx(0.5)
    later = boxes((0, 0, 10, 10), (40, 40, 50, 50), labels=[0, 0], scores=[0.9, 0.4])
    assert detection_metrics([later], [ONE], 1)["map"] == pytest.approx(1.0)


def test_a_box_of_another_class_is_none() -> None:
    found = boxes((0, 0, 10, 10), labels=[1])
    assert detection_metrics([found], [ONE], 2)["map"] == 0.0


def test_nothing_found_and_nothing_there() -> None:
    assert detection_metrics([NONE], [ONE], 1) == {"map": 0.0, "map_50": 0.0}
    assert detection_metrics([ONE], [NONE], 1) == {"map": 0.0, "map_50": 0.0}
    assert detection_metrics([], [], 1) == {"map": 0.0, "map_50": 0.0}


def test_the_summary_of_pycocotools_is_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    draw = np.random.default_rng(0)
    true, found, entries, results = [], [], [], []
    for image in range(12):
        count = int(draw.integers(0, 5))
        corner = draw.uniform(0, 60, (count, 2))
        corners = np.concatenate([corner, corner + draw.uniform(8, 40, (count, 2))], axis=1)
        moved = corners + draw.normal(0, 2, corners.shape)
        labels, scores = draw.integers(0, 3, count), draw.random(count)
        true.append(boxes(*corners, labels=labels.tolist()))
        found.append(boxes(*moved, labels=labels.tolist(), scores=scores.tolist() or None))
        for side, into in ((true[-1], entries), (found[-1], results)):
            for box, label, score in zip(side.sides, side.labels, side.scores, strict=True):
                more = {"iscrowd": 0, "area": box[2] * box[3], "id": len(into) + 1}
                own = {"image_id": image, "category_id": int(label), "bbox": box}
                into.append({**own, **(more if into is entries else {"score": float(score)})})
    reference = COCO()
    reference.dataset = {
        "info": {},
        "images": [{"id": image} for image in range(12)],
        "categories": [{"id": label} for label in range(3)],
        "annotations": entries,
    }
    reference.createIndex()
    evaluation = COCOeval(reference, reference.loadRes(results), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    capsys.readouterr()
    scores = detection_metrics(found, true, 3)
    assert capsys.readouterr().out == ""
    assert 0.1 < scores["map"] < 0.95
    assert [scores["map"], scores["map_50"]] == pytest.approx(evaluation.stats[:2].tolist())
    report = detection_report(found, true, 3)
    assert report["macro"]["ap"] == pytest.approx(scores["map"])
    assert sum(line["support"] for line in report["classes"]) == len(entries)


def test_a_class_that_is_not_there_is_not_averaged() -> None:
    report = detection_report([ONE], [ONE], 2)
    assert [line["ap"] for line in report["classes"]] == pytest.approx([1.0, 0.0])
    assert report["macro"] == pytest.approx({"ap": 1.0, "ap_50": 1.0, "support": 1})
    assert report["weighted"] == report["macro"]

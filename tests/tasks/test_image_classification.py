"""What is made of the outputs for images, beside scikit-learn."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import top_k_accuracy_score
from tiny_vision import png, striped

from lora_cli.config.media import ImageClassificationConfig
from lora_cli.tasks.image_classification import ImageClassification

LABELS = ["a", "b", "c", "d", "e", "f", "g", "h"]
STATE = {"labels": LABELS, "columns": {"image": "image", "label": "label"}, "numbered": False}


@pytest.fixture
def predictions(tmp_path: Path) -> Any:
    (tmp_path / "x.png").write_bytes(png(striped("red", random.Random(0))))
    place = {"path": "x.png", "file": str(tmp_path / "x.png"), "size": 1, "modified": 1}
    task = ImageClassification().build(ImageClassificationConfig(), STATE, None)
    torch.manual_seed(0)
    logits, labels = torch.randn(60, 8), torch.randint(0, 8, (60,))
    batch = {"ids": list(map(str, range(60))), "labels": labels, "places": [place] * 60}
    return task, task.decode({"logits": logits}, batch), logits.numpy(), labels.numpy()


def test_top5_is_that_of_scikit_learn(predictions: Any) -> None:
    task, found, logits, labels = predictions
    scores = task.metrics(found)
    assert set(scores) == {"accuracy", "top5_accuracy", "macro_f1"}
    assert scores["top5_accuracy"] == top_k_accuracy_score(labels, logits, k=5, labels=range(8))
    assert scores["accuracy"] == np.mean(logits.argmax(1) == labels)


def test_the_surest_mistakes_are_shown(predictions: Any) -> None:
    task, found, _, labels = predictions
    pictures = task.report(found)["pictures"]
    wrong = [row for row in found if row.label != row.reference]
    assert len(pictures) == 24 < len(wrong)
    surest = max(wrong, key=lambda row: row.probabilities[row.label])
    uri, text = pictures[0]
    assert uri.startswith("data:image/png;base64,")
    assert text.startswith(f"{surest.id}: {LABELS[labels[int(surest.id)]]}, taken for")


def test_nothing_is_shown_of_rows_without_a_label(predictions: Any) -> None:
    task, found, *_ = predictions
    assert task.report([row for row in found if row.label == row.reference])["pictures"] == []


def test_a_line_of_predictions_has_no_places(predictions: Any) -> None:
    task, found, *_ = predictions
    assert set(task.to_json(found[0])) == {"id", "label", "probabilities", "reference"}

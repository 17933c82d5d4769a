"""Recall at k, beside a plain sort of all similarities."""

from itertools import product

import numpy as np
import pytest

from lora_cli.metrics import retrieval
from lora_cli.metrics.retrieval import retrieval_metrics, wrong_before


def unit(draw: np.random.Generator, names: list[str]) -> np.ndarray:
    """Return a unit vector for each name, the same for equal ones."""
    vectors = {name: draw.normal(size=4) for name in names}
    rows = np.array([vectors[name] / np.linalg.norm(vectors[name]) for name in names])
    return rows.astype(np.float32)


def sorted_recall(asking: dict, answers: dict, pairs: set, *, k: int) -> float:
    """Return recall at k, going by the definition: one sort for each that asks."""
    hits = []
    for name, vector in asking.items():
        ranked = sorted(answers, key=lambda other: -float(vector @ answers[other]))
        hits.append(any((name, other) in pairs for other in ranked[:k]))
    return float(np.mean(hits))


@pytest.mark.parametrize("rows_at_once", [3, 1024])
def test_recall_is_that_of_a_plain_sort(rows_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrieval, "_ROWS", rows_at_once)
    draw = np.random.default_rng(0)
    # Images with several captions, and captions of several images.
    images = [f"i{number}" for number in draw.integers(0, 25, 60)]
    texts = [f"t{number}" for number in draw.integers(0, 30, 60)]
    images_ND, texts_ND = unit(draw, images), unit(draw, texts)
    found = retrieval_metrics(images_ND, texts_ND, images=images, texts=texts)
    by_image = dict(zip(images, images_ND, strict=True))
    by_text = dict(zip(texts, texts_ND, strict=True))
    pairs = set(zip(images, texts, strict=True))
    back = {(text, image) for image, text in pairs}
    for k in (1, 5, 10):
        forth = sorted_recall(by_image, by_text, pairs, k=k)
        assert found[f"image_to_text_recall_at_{k}"] == pytest.approx(forth)
        assert found[f"text_to_image_recall_at_{k}"] == pytest.approx(
            sorted_recall(by_text, by_image, back, k=k)
        )
    recalls = [
        found[f"{side}_recall_at_{k}"]
        for side, k in product(("image_to_text", "text_to_image"), (1, 5, 10))
    ]
    assert found["mean_recall"] == pytest.approx(np.mean(recalls))
    assert 0 < found["mean_recall"] < 1


def test_a_model_that_says_the_same_of_all_finds_nothing() -> None:
    same = np.full((20, 4), 0.5, np.float32)
    names = [str(number) for number in range(20)]
    assert retrieval_metrics(same, same, images=names, texts=names)["mean_recall"] == 0
    nothing = np.full((20, 4), np.nan, np.float32)
    assert retrieval_metrics(nothing, nothing, images=names, texts=names)["mean_recall"] == 0


def test_the_nearest_right_answer_counts() -> None:
    asking = np.array([[1, 0]], np.float32)
    answers = np.array([[0.6, 0.8], [1, 0], [0.8, 0.6]], np.float32)
    assert wrong_before(asking, answers, np.array([[0, 0], [0, 2]])).tolist() == [1]
    assert wrong_before(asking, answers, np.array([[0, 0], [0, 1]])).tolist() == [0]

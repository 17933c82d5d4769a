"""Whether images and captions find each other, each by its embedding.

Something is found at rank k if fewer than k wrong answers are as near to it as its nearest right
one: equal scores never help. An image may have several captions and a caption several images; any
of them is right.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Embeddings = NDArray[np.float32]
Numbers = NDArray[np.int64]

_RANKS = (1, 5, 10)
# Rows of the table of similarities that are in memory at once.
_ROWS = 1024


def retrieval_metrics(
    images_ND: Embeddings, texts_ND: Embeddings, *, images: Sequence[str], texts: Sequence[str]
) -> dict[str, float]:
    """Return recall at 1, 5 and 10, from images to captions and back, and ``mean_recall`` of all.

    Every different image asks once, among the different captions, and every different caption
    once, among the different images.

    Args:
        images_ND: A unit vector for the image of each row.
        texts_ND: One for its caption.
        images: What image each row has, such as a digest.
        texts: The captions.
    """
    image_rows, image_N = _different(images)
    text_rows, text_N = _different(texts)
    images_PD, texts_QD = images_ND[image_rows], texts_ND[text_rows]
    before = {
        "image_to_text": wrong_before(images_PD, texts_QD, np.stack([image_N, text_N])),
        "text_to_image": wrong_before(texts_QD, images_PD, np.stack([text_N, image_N])),
    }
    found = {
        f"{side}_recall_at_{k}": float((counts < k).mean())
        for side, counts in before.items()
        for k in _RANKS
    }
    return {**found, "mean_recall": sum(found.values()) / len(found)}


def wrong_before(asking_PD: Embeddings, answers_QD: Embeddings, right_2N: Numbers) -> Numbers:
    """Return for each that asks how many wrong answers are as near as its nearest right one.

    Args:
        asking_PD: Unit vectors.
        answers_QD: Unit vectors.
        right_2N: Numbers of pairs of these that belong together; everyone who asks has one.

    >>> x = np.eye(3, dtype=np.float32)
    >>> wrong_before(x, x[[1, 0, 2]], np.array([[0, 1, 2], [0, 1, 2]])).tolist()
    [2, 2, 0]
    """
    counts = np.empty(len(asking_PD), np.int64)
    for start in range(0, len(asking_PD), _ROWS):
        scores = asking_PD[start : start + _ROWS] @ answers_QD.T
        inside = (right_2N[0] >= start) & (right_2N[0] < start + len(scores))
        rows, columns = right_2N[0, inside] - start, right_2N[1, inside]
        best = np.full(len(scores), -np.inf, np.float32)
        with np.errstate(invalid="ignore"):
            np.maximum.at(best, rows, scores[rows, columns])
        scores[rows, columns] = -np.inf
        # What is no number is never below: it counts as wrong and near.
        counts[start : start + len(scores)] = (~(scores < best[:, None])).sum(axis=1)
    return counts


def _different(names: Sequence[str]) -> tuple[Numbers, Numbers]:
    """Return the row where each different name is first, and the number of each row's name."""
    _, rows, numbers = np.unique(np.array(names), return_index=True, return_inverse=True)
    return rows, numbers

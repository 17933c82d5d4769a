import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, log_loss

from lora_cli.metrics.perplexity import masked_metrics, perplexity


@given(st.lists(st.integers(0, 4), min_size=1, max_size=9), st.integers(0, 2**32 - 1))
def test_both_equal_scikit_learn(counts: list[int], seed: int) -> None:
    draw = np.random.default_rng(seed)
    total = sum(counts)
    if not total:
        assert masked_metrics([0.0] * len(counts), counts, counts) == {
            "perplexity": 1.0,
            "accuracy": 0.0,
        }
        return
    probabilities = draw.dirichlet(np.ones(7), total)
    true = draw.integers(0, 7, total)
    rows = np.repeat(np.arange(len(counts)), counts)
    losses = -np.log(probabilities[np.arange(total), true])
    right = probabilities.argmax(1) == true
    found = masked_metrics(
        [float(losses[rows == row].sum()) for row in range(len(counts))],
        [int(right[rows == row].sum()) for row in range(len(counts))],
        counts,
    )
    mean = log_loss(true, probabilities, labels=range(7))
    assert found["perplexity"] == pytest.approx(math.exp(mean))
    assert found["accuracy"] == pytest.approx(accuracy_score(true, probabilities.argmax(1)))


def test_a_broken_model_still_has_a_number() -> None:
    assert math.isfinite(perplexity(1e9, 1))
    assert perplexity(0.0, 0) == 1.0

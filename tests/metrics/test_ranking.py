import math
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import ndcg_score, roc_auc_score

from lora_cli.metrics.ranking import auc, first_place, ndcg, ranking_metrics

# Few different scores, so that there are ties.
ITEMS = st.lists(
    st.tuples(st.sampled_from([0.1, 0.2, 0.25, 0.7, 0.9]), st.booleans()), min_size=2, max_size=12
)


def arrays(items: Sequence[tuple[float, bool]]) -> Any:
    return np.array([score for score, _ in items]), np.array([flag for _, flag in items], bool)


@given(ITEMS.filter(lambda items: len({flag for _, flag in items}) == 2))
def test_auc_is_that_of_scikit_learn(items: list[tuple[float, bool]]) -> None:
    scores, clicked = arrays(items)
    assert auc(scores, clicked) == pytest.approx(roc_auc_score(clicked, scores))


@given(ITEMS.filter(lambda items: any(flag for _, flag in items)), st.integers(1, 14))
def test_ndcg_is_that_of_scikit_learn(items: list[tuple[float, bool]], k: int) -> None:
    scores, clicked = arrays(items)
    assert ndcg(scores, clicked, k=k) == pytest.approx(ndcg_score([clicked], [scores], k=k))


@given(ITEMS.filter(lambda items: any(flag for _, flag in items)))
def test_the_first_place_is_that_of_the_worst_order(items: list[tuple[float, bool]]) -> None:
    ordered = sorted(items, key=lambda item: (-item[0], item[1]))
    place = next(n for n, (_, flag) in enumerate(ordered, start=1) if flag)
    assert first_place(*arrays(items)) == place


def test_metrics_are_means_over_users_as_written_out_by_hand() -> None:
    draw = random.Random(3)
    users = [
        [(draw.random(), draw.random() < 0.3) for _ in range(draw.randint(2, 30))]
        for _ in range(40)
    ]
    found = ranking_metrics([arrays(user) for user in users], k=5)
    aucs, ndcgs, hits, reciprocals = [], [], [], []
    for user in users:
        scores, clicked = arrays(user)
        if clicked.any() and not clicked.all():
            aucs.append(roc_auc_score(clicked, scores))
        if not clicked.any():
            continue
        ranked = [flag for _, flag in sorted(user, key=lambda item: -item[0])]
        gains = [1 / math.log2(n + 2) for n, flag in enumerate(ranked[:5]) if flag]
        ideal = [1 / math.log2(n + 2) for n in range(min(5, sum(ranked)))]
        ndcgs.append(sum(gains) / sum(ideal))
        hits.append(any(ranked[:5]))
        reciprocals.append(1 / (1 + ranked.index(True)))
    assert 0 < len(aucs) <= len(ndcgs) < len(users)
    every = arrays([item for user in users for item in user])
    assert found == pytest.approx(
        {
            "auc": np.mean(aucs),
            "ndcg": np.mean(ndcgs),
            "hit_rate": np.mean(hits),
            "mrr": np.mean(reciprocals),
            "auc_all": roc_auc_score(every[1], every[0]),
        }
    )


def test_what_cannot_be_compared_says_nothing() -> None:
    nothing = {"auc": 0.5, "ndcg": 0.0, "hit_rate": 0.0, "mrr": 0.0, "auc_all": 0.5}
    assert ranking_metrics([], k=3) == nothing
    assert ranking_metrics([arrays([(0.1, False), (0.2, False)])], k=3) == nothing
    all_clicked = ranking_metrics([arrays([(0.1, True), (0.2, True)])], k=1)
    assert all_clicked == {"auc": 0.5, "ndcg": 1.0, "hit_rate": 1.0, "mrr": 1.0, "auc_all": 0.5}


def test_equal_scores_gain_nothing() -> None:
    scores = ranking_metrics([arrays([(0.5, False), (0.5, True), (0.5, False)])], k=2)
    assert (scores["auc"], scores["hit_rate"], scores["mrr"]) == (0.5, 0.0, 1 / 3)

import warnings

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score, precision_recall_fscore_support

from lora_cli.metrics.multi_label import multi_label_metrics, multi_label_report


@pytest.mark.parametrize("seed", range(6))
def test_scores_are_those_of_scikit_learn(seed: int) -> None:
    generator = np.random.default_rng(seed)
    actual = generator.random((1 + 9 * seed, 4)) < 0.3
    predicted = actual ^ (generator.random(actual.shape) < 0.2)
    with warnings.catch_warnings(action="ignore"):
        expected = {
            "micro_f1": f1_score(actual, predicted, average="micro", zero_division=0),
            "macro_f1": f1_score(actual, predicted, average="macro", zero_division=0),
            "exact_match": accuracy_score(actual, predicted),
        }
        table = precision_recall_fscore_support(actual, predicted, zero_division=0)
    assert multi_label_metrics(predicted, actual) == pytest.approx(expected)
    report = multi_label_report(predicted, actual)
    for index, scores in enumerate(report["classes"]):
        names = ("precision", "recall", "f1", "support")
        assert [scores[name] for name in names] == pytest.approx([part[index] for part in table])
    assert report["weighted"]["support"] == actual.sum()


def test_no_rows() -> None:
    none = np.zeros((0, 3), bool)
    assert set(multi_label_metrics(none, none).values()) == {0.0}

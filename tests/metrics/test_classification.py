import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as reference

from lora_cli.metrics.classification import (
    METRICS,
    Accuracy,
    MacroF1,
    class_report,
    classification_metrics,
    confusion_matrix,
)

CLASSES = 4
PAIRS = st.lists(
    st.tuples(st.integers(0, CLASSES - 1), st.integers(0, CLASSES - 1)), min_size=1, max_size=40
)


# scikit-learn remarks on lists in which only one class occurs.
@pytest.mark.filterwarnings("ignore:A single label was found:UserWarning")
@settings(max_examples=40)
@given(PAIRS)
def test_all_values_equal_those_of_scikit_learn(pairs):
    predicted, actual = (list(side) for side in zip(*pairs, strict=True))
    labels = list(range(CLASSES))
    found = classification_metrics(predicted, actual, num_classes=CLASSES)
    assert found["accuracy"] == pytest.approx(reference.accuracy_score(actual, predicted))
    assert found["macro_f1"] == pytest.approx(
        reference.f1_score(actual, predicted, average="macro", zero_division=0)
    )
    assert found["matthews_correlation"] == pytest.approx(
        reference.matthews_corrcoef(actual, predicted), abs=1e-12
    )
    counts = confusion_matrix(predicted, actual, CLASSES)
    expected_counts = reference.confusion_matrix(actual, predicted, labels=labels)
    np.testing.assert_array_equal(counts, expected_counts)
    report = class_report(predicted, actual, CLASSES)
    expected = reference.classification_report(
        actual, predicted, labels=labels, output_dict=True, zero_division=0
    )
    named = {str(index): scores for index, scores in enumerate(report["classes"])}
    named |= {"macro avg": report["macro"], "weighted avg": report["weighted"]}
    # Without a list of labels, scikit-learn takes the mean over those that it meets.
    usual = reference.classification_report(actual, predicted, output_dict=True, zero_division=0)
    expected["macro avg"] = usual["macro avg"]
    for name, scores in named.items():
        for ours, theirs in (("f1", "f1-score"), ("precision",) * 2, ("recall",) * 2):
            assert scores[ours] == pytest.approx(expected[name][theirs]), (name, ours)
        assert scores["support"] == expected[name]["support"]


def test_a_known_case_by_hand():
    predicted, actual = [0, 0, 1, 1], [0, 1, 1, 1]
    found = classification_metrics(predicted, actual, num_classes=2)
    assert found["accuracy"] == pytest.approx(3 / 4)
    assert found["macro_f1"] == pytest.approx((2 / 3 + 4 / 5) / 2)
    assert found["matthews_correlation"] == pytest.approx((1 * 2 - 0 * 1) / np.sqrt(2 * 1 * 3 * 2))


def test_constant_predictions_are_zero_not_nan():
    found = classification_metrics([1, 1, 1], [1, 1, 1], num_classes=3)
    assert found == {
        "accuracy": 1.0,
        "macro_f1": 1.0,
        "matthews_correlation": 0.0,
    }


def test_indices_and_lengths_are_checked():
    for predicted, actual in (([0, 2], [0, 1]), ([0, -1], [0, 1]), ([0], [0, 1])):
        with pytest.raises(ValueError, match="must be"):
            confusion_matrix(predicted, actual, 2)


def test_a_metric_can_be_fed_in_batches():
    metric = Accuracy()
    metric.add_batch(predictions=[0, 1], references=[0, 0])
    metric.add_batch(predictions=[1, 1], references=[1, 1])
    assert metric.compute(num_classes=2) == {"accuracy": 0.75}
    assert MacroF1().name == "macro_f1"
    assert {name: name for name in METRICS} == {name: cls().name for name, cls in METRICS.items()}


@pytest.mark.slow
def test_nothing_is_written_to_a_cache(tmp_path):
    code = (
        "from lora_cli.metrics.classification import classification_metrics as m\n"
        "assert m([0, 1], [0, 1], num_classes=2)['accuracy'] == 1.0"
    )
    environment = {**os.environ, "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    environment = {k: v for k, v in environment.items() if k not in ("HF_HOME", "XDG_CACHE_HOME")}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=60)
    assert [path for path in tmp_path.rglob("*") if "metrics" in path.parts] == []

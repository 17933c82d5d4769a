"""Entities and their scores against seqeval, scores of words against scikit-learn."""

import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st
from seqeval.metrics import (
    accuracy_score,
    classification_report,
    f1_score,
    precision_score,
    recall_score,
)
from seqeval.metrics.sequence_labeling import get_entities
from sklearn.metrics import f1_score as sklearn_f1
from sklearn.metrics import precision_recall_fscore_support

from lora_cli.metrics.tags import (
    entity_metrics,
    entity_report,
    find_entities,
    has_entities,
    word_metrics,
    word_report,
)

TAGS = ["O", *(f"{position}-{kind}" for position in "BIES" for kind in ("PER", "LOC"))]
ROWS = st.lists(
    st.lists(st.tuples(st.sampled_from(TAGS), st.sampled_from(TAGS)), min_size=1, max_size=8),
    min_size=1,
    max_size=6,
)


@given(st.lists(st.sampled_from(TAGS), max_size=12))
def test_entities_are_those_of_seqeval_whatever_the_order(tags: list[str]) -> None:
    expected = [(kind, first, last + 1) for kind, first, last in get_entities(tags)]
    assert find_entities(tags) == expected


@given(ROWS)
def test_scores_are_those_of_seqeval(rows: list[list[tuple[str, str]]]) -> None:
    predicted = [[tag for tag, _ in row] for row in rows]
    actual = [[tag for _, tag in row] for row in rows]
    found, report = entity_metrics(predicted, actual), entity_report(predicted, actual)
    with warnings.catch_warnings(action="ignore"):
        expected = {
            "precision": precision_score(actual, predicted, zero_division=0),
            "recall": recall_score(actual, predicted, zero_division=0),
            "f1": f1_score(actual, predicted, zero_division=0),
            "accuracy": accuracy_score(actual, predicted),
        }
        if report["labels"]:
            expected["macro_f1"] = f1_score(actual, predicted, average="macro", zero_division=0)
            whole = classification_report(actual, predicted, output_dict=True, zero_division=0)
            for name, scores in zip(report["labels"], report["classes"], strict=True):
                for score, key in (("f1", "f1-score"), ("recall", "recall")):
                    assert scores[score] == pytest.approx(whole[name][key])
                assert scores["support"] == whole[name]["support"]
    assert {name: found[name] for name in expected} == pytest.approx(expected)


def test_other_names_of_positions_mean_the_same() -> None:
    bioes = ["B-X", "I-X", "E-X", "S-X", "O"]
    assert find_entities(["B-X", "M-X", "E-X", "S-X", "O"]) == find_entities(bioes)
    assert find_entities(["B-X", "I-X", "L-X", "U-X", "O"]) == find_entities(bioes)
    assert find_entities(bioes) == [("X", 0, 3), ("X", 3, 4)]


def test_a_word_without_a_tag_is_outside() -> None:
    assert find_entities(["B-X", None, "I-X"]) == [("X", 0, 1), ("X", 2, 3)]


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        (["O", "B-PER"], True),
        (["B-creative-work", "I-creative-work", "O"], True),
        (["NOUN", "VERB"], False),
        (["O", "PER"], False),
        (["O"], False),
    ],
)
def test_what_marks_entities(tags: list[str], expected: bool) -> None:
    assert has_entities(tags) is expected


@given(ROWS)
def test_scores_of_words_are_those_of_scikit_learn(rows: list[list[tuple[str, str]]]) -> None:
    predicted = [[tag for tag, _ in row] for row in rows]
    actual = [[tag for _, tag in row] for row in rows]
    flat = [tag for row in actual for tag in row], [tag for row in predicted for tag in row]
    found, report = word_metrics(predicted, actual, TAGS), word_report(predicted, actual, TAGS)
    macro = sklearn_f1(*flat, average="macro", zero_division=0)
    assert found["macro_f1"] == pytest.approx(macro)
    precision, recall, f1, support = precision_recall_fscore_support(
        *flat, labels=TAGS, zero_division=0
    )
    for index, scores in enumerate(report["classes"]):
        assert scores == pytest.approx(
            {
                "precision": precision[index],
                "recall": recall[index],
                "f1": f1[index],
                "support": support[index],
            }
        )


def test_a_word_without_a_tag_is_a_miss_alone() -> None:
    report = word_report([["A", None]], [["A", "B"]], ["A", "B"])
    assert [scores["recall"] for scores in report["classes"]] == [1.0, 0.0]
    assert report["classes"][0]["precision"] == 1.0
    assert word_metrics([["A", None]], [["A", "B"]], ["A", "B"])["accuracy"] == 0.5


def test_no_rows() -> None:
    assert set(entity_metrics([], []).values()) == {0.0}
    assert entity_report([], [])["labels"] == []
    assert word_metrics([], [], ["A"]) == {"accuracy": 0.0, "macro_f1": 0.0}

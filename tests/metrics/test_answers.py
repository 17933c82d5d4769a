"""Scores against the definitions of the scripts of SQuAD and CMRC 2018, written out again."""

import math
import re
import string
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_cli.metrics.answers import (
    SCORES,
    answer_metrics,
    best_thresholds,
    character_scores,
    word_scores,
)

WORDS = ["the", "a", "An", "Paris", "paris", "in", "tower", "Tower!", "10,000", "-", "U.S.", "than"]
texts = st.lists(st.sampled_from(WORDS), max_size=5).map(" ".join)
chinese = st.text(alphabet="北京大学市，。《》.,a12 B-", max_size=8)  # noqa: RUF001


def squad_normal(text: str) -> str:
    """Steps of the scripts one by one: lower, punctuation, articles, white space."""
    text = text.lower()
    text = "".join(c for c in text if c not in set(string.punctuation))
    text = re.sub(r"\b(a|an|the)\b", " ", text)
    return " ".join(text.split())


def squad_1(predicted: str, answers: list[str]) -> tuple[float, float]:
    exact, best = 0.0, 0.0
    for answer in answers:
        exact = max(exact, float(squad_normal(predicted) == squad_normal(answer)))
        first, second = squad_normal(predicted).split(), squad_normal(answer).split()
        same = sum((Counter(first) & Counter(second)).values())
        if same:
            precision, recall = same / len(first), same / len(second)
            best = max(best, 2 * precision * recall / (precision + recall))
    return exact, best


def squad_2(predicted: str, answers: list[str]) -> tuple[float, float]:
    answers = [answer for answer in answers if squad_normal(answer)] or [""]
    exact = max(int(squad_normal(answer) == squad_normal(predicted)) for answer in answers)
    best = 0.0
    for answer in answers:
        gold, given_ = squad_normal(answer).split(), squad_normal(predicted).split()
        same = sum((Counter(gold) & Counter(given_)).values())
        if not gold or not given_:
            f1 = float(gold == given_)
        elif same == 0:
            f1 = 0.0
        else:
            precision, recall = same / len(given_), same / len(gold)
            f1 = 2 * precision * recall / (precision + recall)
        best = max(best, f1)
    return float(exact), best


@given(texts, st.lists(texts, max_size=3))
def test_words_are_scored_as_by_squad_2(predicted: str, answers: list[str]) -> None:
    assert word_scores(predicted, answers) == pytest.approx(squad_2(predicted, answers))


@given(texts, st.lists(texts.filter(squad_normal), min_size=1, max_size=3))
def test_words_are_scored_as_by_squad_1(predicted: str, answers: list[str]) -> None:
    assert word_scores(predicted, answers) == pytest.approx(squad_1(predicted, answers))


MARKS = set("-:_*^/\\~`+=，。：？！“”；’《》·、「」（）－～『』")  # noqa: RUF001


def segments(text: str) -> list[str]:
    """Chinese characters alone, the rest in runs that are cut into words, numbers and marks."""
    out, run = [], ""
    for character in text.lower().strip():
        if character in MARKS:
            continue
        if "\u4e00" <= character <= "\u9fa5":
            out += [*tokens(run), character]
            run = ""
        else:
            run += character
    return out + tokens(run)


def tokens(run: str) -> list[str]:
    """As nltk does it: at white space, then marks off words, but not those inside of numbers."""
    out: list[str] = []
    for part in run.split():
        word = ""
        for n, character in enumerate(part):
            around = part[n - 1 : n] + part[n + 1 : n + 2]
            if character.isalnum() or (len(around) == 2 and around.isdigit()):
                word += character
                continue
            out += [word, character] if word else [character]
            word = ""
        out += [word] if word else []
    return re.sub(r"(?<=\.) (?=\.)", "", " ".join(out)).split()


def cmrc(predicted: str, answers: list[str]) -> tuple[float, float]:
    def plain(text: str) -> str:
        return "".join(c for c in text.lower().strip() if c not in MARKS)

    exact = float(any(plain(predicted) == plain(answer) for answer in answers))
    best = 0.0
    for answer in answers:
        first, second = segments(answer), segments(predicted)
        # The longest run in common, by the table of all pairs.
        table = [[0] * (len(second) + 1) for _ in range(len(first) + 1)]
        for i, x in enumerate(first):
            for j, y in enumerate(second):
                table[i + 1][j + 1] = table[i][j] + 1 if x == y else 0
        same = max(map(max, table))
        if same:
            precision, recall = same / len(second), same / len(first)
            best = max(best, 2 * precision * recall / (precision + recall))
    return exact, best


@given(chinese, st.lists(chinese, min_size=1, max_size=3))
def test_characters_are_scored_as_by_cmrc(predicted: str, answers: list[str]) -> None:
    assert character_scores(predicted, answers) == pytest.approx(cmrc(predicted, answers))


def test_characters_by_hand() -> None:
    assert character_scores("1998年，北京", ["1998年北京"]) == (1, 1)  # noqa: RUF001
    # Two characters in common that are apart are a run of one.
    assert character_scores("北京", ["北南京"])[1] == pytest.approx(2 * (1 / 2 * 1 / 3) / (5 / 6))
    assert character_scores("7days店1,000.5元...", ["7店1,000.5元."])[1] == pytest.approx(6 / 10)
    assert character_scores("", []) == (1, 1)
    assert character_scores("京", []) == (0, 0)


@pytest.mark.parametrize("unit", SCORES)
def test_means_are_over_all_and_over_both_kinds(unit: str) -> None:
    predicted = ["Paris", "Rome", "", "Oslo", ""]
    references = [["Paris"], ["Oslo"], [], [], ["Bonn"]]
    metrics = answer_metrics(predicted, references, unit=unit)
    assert metrics == {
        "exact_match": 2 / 5,
        "f1": 2 / 5,
        "has_answer_exact_match": pytest.approx(1 / 3),
        "has_answer_f1": pytest.approx(1 / 3),
        "no_answer_accuracy": 1 / 2,
    }
    assert set(answer_metrics(predicted[:2], references[:2], unit=unit)) == {"exact_match", "f1"}
    assert answer_metrics([], [], unit=unit) == {"exact_match": 0, "f1": 0}


cases = st.lists(
    st.tuples(
        st.sampled_from(["Paris", "in Paris", "Rome", ""]),
        st.integers(-3, 3).map(float),
        st.sampled_from([[], ["Paris"], ["Rome", "in Rome"]]),
    ),
    min_size=1,
    max_size=8,
)


@given(cases)
def test_the_best_threshold_is_the_best_of_all(questions: list[Any]) -> None:
    predicted, differences, references = map(list, zip(*questions, strict=True))
    found = best_thresholds(predicted, differences, references, unit="words")

    def at(threshold: float, name: str) -> float:
        chosen = [
            "" if difference > threshold else text
            for text, difference in zip(predicted, differences, strict=True)
        ]
        return answer_metrics(chosen, references, unit="words")[name]

    for name in ("exact_match", "f1"):
        threshold = found[f"best_{name}_threshold"]
        assert math.isfinite(threshold)
        best = max(at(x, name) for x in (min(differences) - 1, *differences))
        assert at(threshold, name) == pytest.approx(best)
        assert found[f"best_{name}"] == pytest.approx(best)


def test_no_questions_have_no_threshold() -> None:
    assert best_thresholds([], [], [], unit="words") == {}

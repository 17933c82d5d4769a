"""Scores of answers that are parts of a text.

Those by words are defined as in the script of SQuAD 2.0, and so as in that of 1.1 wherever a true
answer is more than articles and punctuation. Those by characters are defined as in the script of
CMRC 2018, but for what is no Chinese: words and marks are told apart by a pattern there, rather
than by nltk. An answer is right if it is like any of the true ones; both scores are the best over
these. A question without an answer has the empty text as its only true one.
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from difflib import SequenceMatcher

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
# What the script of CMRC 2018 leaves out; the list is its own, with neither "." nor ",".
_MARKS = frozenset("-:_*^/\\~`+=，。：？！“”；’《》·、「」（）－～『』")  # noqa: RUF001, meant
_LETTERS = r"(?:(?![一-龥])\w)+"
# Words, numbers such as 10,000.5 whole, then runs of dots, then marks one by one.
_SEGMENT = re.compile(rf"[一-龥]|{_LETTERS}(?:(?<=\d)[.,](?=\d){_LETTERS})*|\.{{2,}}|[^\w\s]")

# Exact match and F1, each from 0 to 1.
Scores = tuple[float, float]


def word_scores(predicted: str, answers: Sequence[str]) -> Scores:
    """Return exact match and F1 of words, after case, articles and punctuation are left out.

    >>> word_scores("the Eiffel Tower!", ["Eiffel tower"]), word_scores("", [])
    ((1.0, 1.0), (1.0, 1.0))
    >>> word_scores("in Paris", ["Paris", "Rome"])
    (0.0, 0.6666666666666666)
    """
    given = _words(predicted)
    # One that is nothing but articles and punctuation counts only where there is no other.
    true = [words for text in answers if (words := _words(text))] or [[]]
    return max(float(given == words) for words in true), max(_f1(given, words) for words in true)


def _words(text: str) -> list[str]:
    plain = text.lower().translate(_NO_PUNCTUATION)
    return _ARTICLES.sub(" ", plain).split()


def _f1(given: Sequence[str], true: Sequence[str]) -> float:
    if not given or not true:
        return float(given == true)
    return _harmonic((Counter(given) & Counter(true)).total(), given, true)


def _harmonic(same: int, given: Sequence[str], true: Sequence[str]) -> float:
    if same == 0:
        return 0.0
    precision, recall = same / len(given), same / len(true)
    return 2 * precision * recall / (precision + recall)


def character_scores(predicted: str, answers: Sequence[str]) -> Scores:
    """Return exact match without punctuation, and F1 of the longest run in common.

    Both answers are cut into Chinese characters, and words and numbers of other scripts.

    >>> character_scores("北京大学", ["《北京大学》", "大学"])
    (1.0, 1.0)
    >>> character_scores("北京大学", ["北京市"])
    (0.0, 0.5714285714285715)
    """
    true = list(answers) or [""]
    exact = max(float(_unmarked(predicted) == _unmarked(text)) for text in true)
    if not answers:
        return exact, exact
    return exact, max(_run_f1(_segments(predicted), _segments(text)) for text in true)


def _unmarked(text: str) -> str:
    return "".join(character for character in text.lower().strip() if character not in _MARKS)


def _segments(text: str) -> list[str]:
    return _SEGMENT.findall(_unmarked(text))


def _run_f1(given: Sequence[str], true: Sequence[str]) -> float:
    run = SequenceMatcher(None, given, true, autojunk=False).find_longest_match()
    return _harmonic(run.size, given, true)


SCORES: dict[str, Callable[[str, Sequence[str]], Scores]] = {
    "words": word_scores,
    "characters": character_scores,
}
"""By what an answer is measured."""


def answer_metrics(
    predicted: Sequence[str], references: Sequence[Sequence[str]], *, unit: str
) -> dict[str, float]:
    """Return ``exact_match`` and ``f1``, means over the questions.

    Where questions without an answer are among them: these for the questions with one as well
    (``has_answer_...``), and ``no_answer_accuracy``, the share of the others with no prediction.

    Args:
        predicted: The answer of each question, empty for none.
        references: The true answers of each question; none for a question without one.
        unit: A key of `SCORES`.
    """
    scores = [SCORES[unit](*pair) for pair in zip(predicted, references, strict=True)]
    metrics = _means(scores)
    if all(references):
        return metrics
    answered = [found for found, true in zip(scores, references, strict=True) if true]
    others = [found for found, true in zip(scores, references, strict=True) if not true]
    metrics |= {f"has_answer_{name}": value for name, value in _means(answered).items()}
    return metrics | {"no_answer_accuracy": _means(others)["exact_match"]}


def _means(scores: Sequence[Scores]) -> dict[str, float]:
    count = max(1, len(scores))
    return {
        "exact_match": sum(exact for exact, _ in scores) / count,
        "f1": sum(f1 for _, f1 in scores) / count,
    }


def best_thresholds(
    predicted: Sequence[str],
    differences: Sequence[float],
    references: Sequence[Sequence[str]],
    *,
    unit: str,
) -> dict[str, float]:
    """Return the best scores that a threshold for having no answer gives, and that threshold.

    A question gets no answer where its difference is above the threshold. Of thresholds that are
    equally good the lowest is returned: a difference that there is, or one less than all.

    Args:
        predicted: The answer of each question if it gets one.
        differences: How much more having no answer is believed than this one.
        references: As in `answer_metrics`.
        unit: A key of `SCORES`.

    Returns:
        ``best_exact_match``, ``best_exact_match_threshold``, ``best_f1`` and
        ``best_f1_threshold``; nothing for no questions.
    """
    if not predicted:
        return {}
    score, order = SCORES[unit], sorted(range(len(predicted)), key=lambda n: differences[n])
    spoken = [score(*pair) for pair in zip(predicted, references, strict=True)]
    silent = [score("", true) for true in references]
    found: dict[str, float] = {}
    for kind, name in enumerate(("exact_match", "f1")):
        total = sum(scores[kind] for scores in silent)
        best, threshold = total, differences[order[0]] - 1.0
        for place, n in enumerate(order):
            total += spoken[n][kind] - silent[n][kind]
            is_last = place + 1 == len(order) or differences[order[place + 1]] > differences[n]
            # Sums of the same scores in another order differ by rounding.
            if is_last and total > best + 1e-9:
                best, threshold = total, differences[n]
        found |= {f"best_{name}": best / len(order), f"best_{name}_threshold": threshold}
    return found

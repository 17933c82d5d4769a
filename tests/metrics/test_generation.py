import importlib.util
import math
import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest

from lora_cli.errors import UserError
from lora_cli.metrics.generation import (
    METRICS,
    check_metric_packages,
    exact_match,
    generation_metrics,
    split_words,
    text_tokenizer,
)

WORDS = ["the", "a", "cat", "dog", "sat", "ran", "on", "under", "mat", "tree", "red", "big", "very"]


def grams(words: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def bleu(texts: list[list[str]], references: list[list[list[str]]]) -> float:
    """Papineni et al. 2002, section 2.3, with the nearest reference length."""
    logs, own, wanted = 0.0, 0, 0
    for text, refs in zip(texts, references, strict=True):
        own += len(text)
        wanted += min((abs(len(ref) - len(text)), len(ref)) for ref in refs)[1]
    for n in range(1, 5):
        hits = total = 0
        for text, refs in zip(texts, references, strict=True):
            found = grams(text, n)
            most: Counter[tuple[str, ...]] = Counter()
            for ref in refs:
                most |= grams(ref, n)
            hits += sum((found & most).values())
            total += sum(found.values())
        logs += math.log(hits / total) / 4
    return 100 * math.exp(min(0.0, 1 - wanted / own)) * math.exp(logs)


def chrf(texts: list[str], references: list[str]) -> float:
    """Popovic 2015: runs of 1 to 6 characters, recall weighed twice, over all texts."""
    scores = []
    for n in range(1, 7):
        hits = own = wanted = 0
        for text, ref in zip(texts, references, strict=True):
            a, b = (grams("".join(one.split()), n) for one in (text, ref))
            hits, own = hits + sum((a & b).values()), own + sum(a.values())
            wanted += sum(b.values())
        scores.append((hits / own, hits / wanted))
    precision, recall = (sum(one) / 6 for one in zip(*scores, strict=True))
    return 100 * 5 * precision * recall / (4 * precision + recall)


def common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    row = [0] * (len(b) + 1)
    for x in a:
        before = 0
        for j, y in enumerate(b, start=1):
            before, row[j] = row[j], before + 1 if x == y else max(row[j], row[j - 1])
    return row[-1]


def f1(hits: int, own: int, wanted: int) -> float:
    return 200 * hits / (own + wanted) if hits else 0.0


def rouge(texts: list[list[str]], references: list[list[list[str]]]) -> dict[str, float]:
    found = dict.fromkeys(("rouge1", "rouge2", "rougeL"), 0.0)
    for text, refs in zip(texts, references, strict=True):
        for n in (1, 2):
            found[f"rouge{n}"] += max(
                f1(
                    sum((grams(text, n) & grams(ref, n)).values()),
                    max(0, len(text) - n + 1),
                    max(0, len(ref) - n + 1),
                )
                for ref in refs
            )
        found["rougeL"] += max(
            f1(common_subsequence(text, ref), len(text), len(ref)) for ref in refs
        )
    return {name: value / len(texts) for name, value in found.items()}


def sentence(draw: random.Random, words: Sequence[str] = WORDS) -> list[str]:
    return draw.choices(words, k=draw.randint(5, 12))


@pytest.mark.parametrize("seed", range(4))
def test_english_by_definition(seed: int) -> None:
    draw = random.Random(seed)
    references = [[sentence(draw) for _ in range(draw.randint(1, 3))] for _ in range(30)]
    texts = [
        [word if draw.random() < 0.7 else draw.choice(WORDS) for word in refs[0]]
        for refs in references
    ]
    joined = [" ".join(text) for text in texts]
    found = generation_metrics(joined, [[" ".join(ref) for ref in refs] for refs in references])
    assert tuple(found) == METRICS
    assert found["bleu"] == pytest.approx(bleu(texts, references))
    assert 5 < found["bleu"] < 95
    assert {name: found[name] for name in METRICS if "rouge" in name} == pytest.approx(
        rouge(texts, references)
    )
    single = [[" ".join(refs[0])] for refs in references]
    alone = generation_metrics(joined, single)
    assert alone["chrf"] == pytest.approx(chrf(joined, [ref for (ref,) in single]))
    assert alone["bleu"] <= found["bleu"]


def test_chinese_by_definition() -> None:
    """Each character is a word, for BLEU and ROUGE alike."""
    draw = random.Random(1)
    signs = "我你他喜欢看书天气很好今明在家里学校"
    references = [[sentence(draw, signs)] for _ in range(20)]
    texts = [
        [sign if draw.random() < 0.7 else draw.choice(signs) for sign in ref]
        for (ref,) in references
    ]
    found = generation_metrics(
        ["".join(text) for text in texts], [["".join(ref)] for (ref,) in references]
    )
    assert found["bleu"] == pytest.approx(bleu(texts, references))
    wanted = rouge(texts, references)
    assert {name: found[name] for name in wanted} == pytest.approx(wanted)
    # As words, whole sentences would be right or wrong.
    as_words = generation_metrics(
        ["".join(text) for text in texts],
        [["".join(ref)] for (ref,) in references],
        tokenizer="13a",
    )
    assert as_words["rouge1"] < found["rouge1"] / 2
    assert as_words["bleu"] < found["bleu"] / 2


def test_english_agrees_with_the_tokenizer_of_rouge_score() -> None:
    from rouge_score.tokenize import tokenize

    for text in ("The cat's 2nd hat, e.g. RED-hot!", "a b  c", ""):
        assert split_words(text, single=False) == tokenize(text, None)
    assert split_words("Größe naïve", single=False) == ["größe", "naïve"]
    assert tokenize("Größe", None) != ["größe"], "the reason for another one"


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("The weather is nice.", "13a"),
        ("今天天气很好。", "zh"),
        ("我用 iPhone 看书。", "zh"),
        ("The word 好 is Chinese, and so is 书.", "13a"),
        ("今日はとても天気がいいです。", "char"),
        ("날씨가 좋습니다", "13a"),
        ("", "13a"),
    ],
)
def test_the_language_decides_the_tokenizer(text: str, name: str) -> None:
    assert text_tokenizer([[text]]) == name


def test_bounds() -> None:
    same = ["the big cat sat on the mat", "a dog ran"]
    found = generation_metrics(same, [[one] for one in same])
    assert {name: round(value, 6) for name, value in found.items()} == {
        **dict.fromkeys(METRICS, 100.0),
        "exact_match": 1.0,
    }
    none = generation_metrics(["xx yy"], [["the cat sat on the mat"]])
    assert {name: none[name] for name in ("rouge1", "rougeL", "exact_match")} == {
        "rouge1": 0.0,
        "rougeL": 0.0,
        "exact_match": 0.0,
    }
    assert generation_metrics([], []) == dict.fromkeys(METRICS, 0.0)
    assert generation_metrics([""], [["the cat"]])["bleu"] == 0.0


def test_one_of_several_references_is_enough() -> None:
    references = [["no", " yes "], ["maybe"]]
    assert exact_match(["yes\n", "Maybe"], references) == 0.5
    assert exact_match([], []) == 0.0
    found = generation_metrics(["a big cat sat"], [["the dog ran very", "a big cat sat"]])
    assert found["rougeL"] == pytest.approx(100)
    assert found["bleu"] == pytest.approx(100)
    assert found["chrf"] == pytest.approx(100)


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    check_metric_packages("task.metric=bleu")
    plain = importlib.util.find_spec

    def find(name: str, package: Any = None) -> Any:
        return None if name == "rouge_score" else plain(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", find)
    with pytest.raises(UserError) as caught:
        check_metric_packages("task.metric=bleu")
    (problem,) = caught.value.problems
    assert problem.id == "task.missing-extra"
    assert problem.message == (
        "`task.metric=bleu` needs the packages sacrebleu and rouge-score, but rouge-score cannot "
        "be imported."
    )
    assert problem.key == "task.metric"
    assert problem.fix == 'pip install "lora-cli[generation]"'

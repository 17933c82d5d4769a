"""The baselines, on rows that can be worked out by hand."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tiny_vision import write_image_folder, write_tiny_vision

from lora_cli.config.commands import TrainConfig
from lora_cli.config.sections import ModelConfig
from lora_cli.config.task_families import TASKS
from lora_cli.config.tasks import DataConfig
from lora_cli.tasks.table import FAMILIES

Values = list[dict[str, Any]]


@pytest.fixture(scope="module")
def baselines(script: Callable[[str], ModuleType]) -> Any:
    return script("baselines")


@pytest.fixture
def case(baselines: Any, tmp_path: Path) -> Callable[..., Any]:
    def make(family: str, train: Values, test: Values, **settings: Any) -> Any:
        for name, rows in {"train": train, "validation": test, "test": test}.items():
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (tmp_path / f"{name}.jsonl").write_text(text, encoding="utf-8")
        columns = settings.pop("columns", {})
        model = ModelConfig(path=settings.pop("model", None))
        task = TASKS[family](data=DataConfig(path=str(tmp_path), **columns), **settings)
        splits = FAMILIES[family].load(task, seed=1)
        return baselines.Case(TrainConfig(task=task, model=model), splits, "test")

    return make


def test_majority_says_the_most_frequent_label_of_train(
    baselines: Any, case: Callable[..., Any]
) -> None:
    train = [{"text": str(n), "label": label} for n, label in enumerate("bbba")]
    test = [{"text": str(9 - n), "label": label} for n, label in enumerate("aab")]
    found = baselines.majority(case("text_classification", train, test))
    assert found["accuracy"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("name", ["words", "characters"])
def test_words_and_characters_tell_texts_apart(
    baselines: Any, case: Callable[..., Any], name: str
) -> None:
    train = [
        {"text": f"{word} {n}", "label": label}
        for n in range(4)
        for word, label in (("splendid", "good"), ("terrible", "bad"))
    ]
    test = [{"text": "splendid 8", "label": "good"}, {"text": "terrible 9", "label": "bad"}]
    found = baselines.BASELINES[name](case("text_classification", train, test))
    assert found["accuracy"] == 1


def test_pairs_are_read_whole_and_compared(baselines: Any, case: Callable[..., Any]) -> None:
    columns = {"text_column": "a", "text_pair_column": "b"}
    rows = [
        {"a": f"one {x}", "b": f"one {y}", "label": "same" if x == y else "other"}
        for x in ("red", "green", "blue")
        for y in ("red", "green", "blue")
    ]
    pairs = case("text_classification", rows, rows, columns=columns)
    assert baselines.likeness(pairs)["accuracy"] == 1
    assert pairs.texts(pairs.train)[1] == "one red | one green"
    scored = [{**row, "label": 5.0 if row["label"] == "same" else 1.0} for row in rows]
    found = baselines.cosine(case("text_regression", scored, scored, columns=columns))
    assert found["pearson"] == pytest.approx(1)
    assert found["mse"] == pytest.approx(0, abs=1e-9)


def test_labels_are_given_to_every_row_or_by_their_words(
    baselines: Any, case: Callable[..., Any]
) -> None:
    train = [
        {"text": f"{word} {n}", "labels": labels}
        for n in range(6)
        for word, labels in (("tea", ["hot", "wet"]), ("ice", ["cold"]), ("rain", ["wet"]))
    ]
    test = [{"text": "tea 9", "labels": ["hot", "wet"]}, {"text": "ice 9", "labels": ["cold"]}]
    rows = case("multi_label_classification", train, test)
    # "wet" alone: one true positive, one false, two missed.
    assert baselines.frequent_labels(rows)["micro_f1"] == pytest.approx(2 / 5)
    # At a threshold that each label reaches: three true positives, three false.
    all_given = case("multi_label_classification", train, test, threshold=0.3)
    assert baselines.frequent_labels(all_given)["micro_f1"] == pytest.approx(6 / 9)
    assert baselines.words_by_label(rows)["exact_match"] == 1


def test_a_word_gets_its_usual_tag(baselines: Any, case: Callable[..., Any]) -> None:
    train = [
        {"tokens": ["Ann", "met", "Bo"], "tags": ["B-PER", "O", "B-PER"]},
        {"tokens": ["Bo", "in", "Bo"], "tags": ["B-LOC", "O", "B-LOC"]},
    ]
    test = [{"tokens": ["Ann", "saw", "Bo"], "tags": ["B-PER", "O", "B-PER"]}]
    found = baselines.usual_tag(case("token_classification", train, test))
    assert found["f1"] == pytest.approx(1 / 2)


def test_the_sentence_nearest_to_the_question_answers_it(
    baselines: Any, case: Callable[..., Any]
) -> None:
    context = "Rain fell. The cat sat on a mat. Nobody came."
    answers = {"text": ["cat sat on mat"], "answer_start": [15]}
    answers["text"] = [context[15:31]]
    rows = [{"id": "1", "context": context, "question": "Where sat the cat?", "answers": answers}]
    found = baselines.sentence(case("question_answering", rows, rows))
    assert context[15:31] == "cat sat on a mat"
    assert found == {"exact_match": 1, "f1": 1}


def test_rare_words_in_common_choose(baselines: Any, case: Callable[..., Any]) -> None:
    def row(context: str, choices: list[str], answer: int) -> dict[str, Any]:
        return {"context": context, "choices": choices, "answer": answer}

    train = [row(f"the thing {n}", ["x y", "z w"], n % 2) for n in range(5)]
    test = [row("the otter", ["the dog", "an otter"], 1), row("the owl", ["a b", "the owl"], 1)]
    found = baselines.overlap(case("multiple_choice", train, test))
    assert found == {"accuracy": 1}


def test_films_are_ranked_by_likes_or_by_their_share(
    baselines: Any, case: Callable[..., Any]
) -> None:
    rows = [
        {"user": "u", "history": ["h"], "candidate": c, "clicked": k, "likes": n, "seen": s}
        for c, k, n, s in [("a", 1, 8, 9), ("b", 0, 20, 90), ("c", 0, 1, 9)]
    ]
    ranking = case("ranking", rows, rows)
    assert baselines.popularity(ranking)["auc"] == 0.5
    assert baselines.share_of_likes(ranking)["auc"] == 1


def test_tokens_are_as_likely_as_they_are_frequent(
    baselines: Any, case: Callable[..., Any], tiny_model_dir: Callable[..., Path]
) -> None:
    from dataclasses import replace

    from transformers import AutoTokenizer

    rows = [{"text": "good bad good good"}]
    made = case("masked_language_modeling", rows, rows, max_length=16, mask_probability=0.9)
    folder = tiny_model_dir()
    model = replace(made.config.model, path=str(folder))
    made = replace(made, config=replace(made.config, model=model))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("good bad good good", add_special_tokens=False)["input_ids"]
    total = len(ids) + 0.1 * len(tokenizer)
    chance = {token: (ids.count(token) + 0.1) / total for token in ids}
    found = baselines.unigram(made)
    # Four words, of which 0.9 are masked: all four, or three of them.
    possible = [ids, *([*ids[:n], *ids[n + 1 :]] for n in range(len(ids)))]
    expected = [
        math.exp(-sum(math.log(chance[token]) for token in kept) / len(kept)) for kept in possible
    ]
    assert any(found["perplexity"] == pytest.approx(value) for value in expected)


def test_a_linear_probe_tells_images_apart_by_a_frozen_model(
    baselines: Any, case: Callable[..., Any], tmp_path: Path
) -> None:
    write_tiny_vision(tmp_path / "vit", "vit")
    write_image_folder(tmp_path / "images", test=8)
    rows = [
        [
            {"image": f"images/{path.relative_to(tmp_path / 'images')}", "label": path.parent.name}
            for path in sorted((tmp_path / "images" / split).rglob("*.png"))
        ]
        for split in ("train", "test")
    ]
    made = case("image_classification", *rows, model=str(tmp_path / "vit"))
    assert baselines.linear_probe(made)["accuracy"] == 1

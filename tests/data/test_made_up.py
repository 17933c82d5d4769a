from dataclasses import replace
from typing import Any

import pytest

from lora_cli.config.language import AnswerChoiceConfig
from lora_cli.config.task_families import TASKS
from lora_cli.data.made_up import answer, answers, choices, label, sentence, tags, text, tokens
from lora_cli.tasks.table import FAMILIES


def test_each_number_has_a_text_of_its_own() -> None:
    assert len({sentence(number) for number in range(24)}) == 24
    assert sentence(3) == sentence(3)


def test_an_answer_stands_at_its_place() -> None:
    config = TASKS["question_answering"]()
    for number in range(24):
        found = answers(config, number)
        (start,), (word,) = found["answer_start"], found["text"]
        assert text(config, number)[start : start + len(word)] == word


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [("index", 1), ("number", 2), ("letter", "B"), ("key", "key 1"), ("auto", None)],
)
def test_an_answer_is_one_of_the_choices(kind: str, wanted: Any) -> None:
    config: Any = replace(TASKS["multiple_choice"](), answers=kind)
    found = choices(config, 1)
    texts = found["text"] if kind == "key" else found
    assert answer(config, 1) == (texts[1] if wanted is None else wanted)
    if kind == "key":
        assert found["label"][1] == wanted


def test_every_word_has_a_tag_of_the_settings() -> None:
    config: Any = TASKS["token_classification"]()
    config = replace(config, data=replace(config.data, label_names=("N", "V")))
    assert len(tags(config, 0)) == len(tokens(config, 0))
    assert set(tags(config, 0)) == {"N", "V"}


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_rows_have_the_columns_of_the_settings(family: str) -> None:
    config: Any = TASKS[family]()
    rows = FAMILIES[family].made_up_rows(config, 24)
    assert len(rows) == 24
    assert len({str(row) for row in rows}) == 24
    columns = {
        f"{name}_column": f"my {name}"
        for name in (
            "text",
            "tokens",
            "question",
            "candidate",
            "prompt",
            "source",
            "image",
            "audio",
        )
    }
    config = replace(config, data=replace(config.data, **columns))
    for row in FAMILIES[family].made_up_rows(config, 3):
        assert any(name.startswith("my ") for name in row)


def test_labels_with_a_column_each_are_made_up_as_such() -> None:
    config: Any = TASKS["multi_label_classification"]()
    config = replace(config, data=replace(config.data, label_columns=("rude", "threat")))
    rows = FAMILIES["multi_label_classification"].made_up_rows(config, 3)
    assert [(row["rude"], row["threat"]) for row in rows] == [(1, 0), (0, 1), (0, 0)]
    assert "label" not in rows[0]


def test_rows_suit_the_answers_and_the_prompt() -> None:
    answers = {"false": "no", "true": "yes"}
    config: Any = replace(
        TASKS["answer_choice"](), answers=answers, prompt="{history} {text} {mood}"
    )
    rows = FAMILIES["answer_choice"].made_up_rows(config, 4)
    assert [row["label"] for row in rows] == ["false", "true", "false", "true"]
    assert all(row["history"] and row["mood"] and row["text"] for row in rows)


def test_labels_are_those_that_have_answers() -> None:
    config: Any = AnswerChoiceConfig(answers={"false": "no", "true": "yes"})
    assert [label(config, number) for number in range(3)] == ["false", "true", "false"]
    assert label(TASKS["multiple_choice"](), 0) == "first"

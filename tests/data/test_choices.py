from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_cli.data.choices import (
    Choices,
    answer_index,
    check_answers,
    check_choices,
    choices_of,
    learn_kind,
    numbered_columns,
)
from lora_cli.data.types import Row
from lora_cli.errors import UserError


def rows_of(*values: tuple[Any, Any]) -> list[Row]:
    """Rows with these choices and answers."""
    return [
        Row(str(n), {"choices": choices, "answer": answer}, "f.jsonl", n)
        for n, (choices, answer) in enumerate(values, start=1)
    ]


def learn(*values: tuple[Any, Any]) -> str:
    return learn_kind(rows_of(*values), ["choices"], "answer")


ABC = ["red", "green", "blue"]
KEYED = {"label": ["A", "B", "C"], "text": ABC}


@pytest.mark.parametrize(
    "value",
    [ABC, KEYED, [{"text": text, "label": key} for text, key in zip(ABC, "ABC", strict=True)]],
)
def test_a_column_holds_choices_in_any_usual_layout(value: Any) -> None:
    found = choices_of(Row("1", {"c": value}, "f", 1), ["c"])
    assert found is not None
    assert found.texts == tuple(ABC)
    assert found.keys == (() if value is ABC else ("A", "B", "C"))


def test_choices_may_be_in_several_columns_and_be_numbers() -> None:
    row = Row("1", {"b": "two", "a": 1, "c": None}, "f", 1)
    assert choices_of(row, ["a", "b"]) == Choices(("1", "two"))
    assert choices_of(row, ["a", "c"]) is None


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (["one"], '["one"]'),
        ([], "empty"),
        ("red, green", '"red, green"'),
        (["red", ""], "choice 2 is empty"),
        (["red", None], "choice 2 is null"),
        (None, "null"),
        ({}, "{}"),
    ],
)
def test_what_are_no_choices(value: Any, said: str) -> None:
    rows = rows_of((ABC, 0), (value, 0))
    (problem,) = check_choices(rows, ["choices"])
    assert problem.id == "data.bad-choices"
    assert problem.where == f"f.jsonl row 2 ({said})"


def test_the_column_without_a_choice_is_named() -> None:
    (problem,) = check_choices([Row("1", {"a": "x", "b": None}, "f", 1)], ["a", "b", "c"])
    assert problem.where == "f row 1 (b is null)"


@pytest.mark.parametrize(
    ("columns", "found"),
    [
        (["sent1", "ending1", "ending0", "ending2"], ("ending0", "ending1", "ending2")),
        (["choice1", "choice2", "question"], ("choice1", "choice2")),
        ([f"option_{n}" for n in range(11)], tuple(f"option_{n}" for n in range(11))),
        (["goal", "sol1", "sol2"], ("sol1", "sol2")),
        (["ending0", "ending2"], ()),
        (["choice1", "ending2"], ()),
    ],
)
def test_numbered_columns(columns: list[str], found: tuple[str, ...]) -> None:
    assert numbered_columns(columns) == found


@given(st.integers(2, 26).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n - 1))))
def test_every_way_to_write_an_answer_means_the_same(pair: tuple[int, int]) -> None:
    count, place = pair
    texts = tuple(f"text {n}" for n in range(count))
    choices = Choices(texts, tuple(f"k{n}" for n in range(count)))
    written = {
        "index": place,
        "number": place + 1,
        "letter": chr(ord("A") + place),
        "text": texts[place],
        "key": f"k{place}",
    }
    for kind, value in written.items():
        assert answer_index(value, choices, kind) == place
        assert answer_index(f" {value} ", choices, kind) == place
    assert answer_index(count, choices, "index") is None
    assert answer_index(0, choices, "number") is None
    assert answer_index(-1, choices, "index") is None


def test_an_answer_that_names_two_choices_names_none() -> None:
    assert answer_index("same", Choices(("same", "same")), "text") is None
    assert answer_index(1.0, Choices(("a", "b")), "index") == 1
    assert answer_index(True, Choices(("a", "b")), "index") is None
    assert answer_index(None, Choices(("a", "b")), "index") is None


@pytest.mark.parametrize(
    ("answers", "kind"),
    [((0, 2, 1), "index"), (("0", "1", "2"), "index"), ("ABC", "letter"), (ABC, "text")],
)
def test_the_way_is_learned_from_all_rows(answers: Any, kind: str) -> None:
    assert learn(*((ABC, answer) for answer in answers)) == kind


def test_keys_of_the_data_come_before_letters() -> None:
    swapped = {"label": ["B", "A"], "text": ["red", "green"]}
    rows = rows_of((swapped, "A"), (swapped, "B"))
    assert learn_kind(rows, ["choices"], "answer") == "key"
    choices = choices_of(rows[0], ["choices"])
    assert choices is not None
    assert answer_index("A", choices, "key") == 1


def test_ways_that_mean_the_same_are_one_and_others_are_refused() -> None:
    assert learn((["0", "1"], "0"), (["0", "1"], "1")) == "text"
    with pytest.raises(UserError) as caught:
        learn((["1", "0"], "0"), (["2", "1"], "1"))
    (problem,) = caught.value.problems
    assert (problem.id, problem.key) == ("data.ambiguous-answers", "task.answers")
    assert problem.allowed == "text, index"


def test_an_answer_out_of_range_is_told_by_place() -> None:
    rows = rows_of((ABC, 0), (ABC[:2], 2), (ABC, None))
    kind = learn_kind(rows, ["choices"], "answer")
    (problem,) = check_answers(rows, ["choices"], "answer", kind=kind)
    assert (problem.id, kind) == ("data.bad-answer", "index")
    assert problem.where == "f.jsonl row 2 (2 of 2 choices), f.jsonl row 3 (null of 3 choices)"
    assert check_answers(rows[:1], ["choices"], "answer", kind=kind) == []


def test_numbers_from_one_are_never_guessed_but_offered() -> None:
    rows = rows_of((ABC, 1), (ABC, 3), (ABC, 2))
    (problem,) = check_answers(
        rows, ["choices"], "answer", kind=learn_kind(rows, ["choices"], "answer")
    )
    assert problem.fix == "task.answers=number, if 1 is the first choice"
    assert check_answers(rows, ["choices"], "answer", kind="number") == []

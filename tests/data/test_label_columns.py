from typing import Any

import pytest

from lora_cli.data.label_columns import JOINED, flag_of, join_label_columns
from lora_cli.data.sources import Loaded
from lora_cli.data.types import Row
from lora_cli.errors import UserError


def loaded(*values: dict[str, Any]) -> Loaded:
    rows = tuple(Row(str(n), value, "d.csv", n) for n, value in enumerate(values, start=1))
    return Loaded(rows={"train": rows[:2], "test": rows[2:]})


@pytest.mark.parametrize(
    ("values", "flag"),
    [
        ((1, 1.0, True, "1", " 1.0 ", "true", "TRUE"), True),
        ((0, 0.0, False, "0", "0.0", "False"), False),
        ((None, "", "yes", "2", 2, -1, "-1", 0.5, [], [1], {}), None),
    ],
)
def test_what_says_yes_or_no(values: tuple[Any, ...], flag: bool | None) -> None:
    assert [flag_of(value) for value in values] == [flag] * len(values)


def test_labels_become_a_list_in_the_order_of_the_columns() -> None:
    found = join_label_columns(
        loaded(
            {"text": "a", "rude": "1", "toxic": "1"},
            {"text": "b", "rude": "0", "toxic": "0"},
            {"text": "c", "rude": True, "toxic": 0},
        ),
        ["toxic", "rude"],
    )
    assert [row.values for row in found.rows["train"]] == [
        {"text": "a", JOINED: ["toxic", "rude"]},
        {"text": "b", JOINED: []},
    ]
    assert [row.values for row in found.rows["test"]] == [{"text": "c", JOINED: ["rude"]}]
    assert found.class_names == {JOINED: ("toxic", "rude")}


def test_bad_values_are_named_with_their_rows() -> None:
    rows = loaded({"a": 1, "b": "0"}, {"a": "yes", "b": None}, {"a": -1})
    with pytest.raises(UserError) as caught:
        join_label_columns(rows, ["a", "b"])
    first, second = caught.value.problems
    assert first.id == second.id == "data.bad-flag"
    assert first.where == 'd.csv row 2 ("yes"), d.csv row 3 (-1)'
    assert second.where == "d.csv row 2 (null), d.csv row 3 (missing)"


def test_the_nearest_column_is_offered() -> None:
    with pytest.raises(UserError) as caught:
        join_label_columns(loaded({"toxic": 1, "rude": 0}), ["toxik", "rude"])
    (problem,) = caught.value.problems
    assert problem.id == "data.missing-column"
    assert problem.fix == 'did you mean "toxic"?'


@pytest.mark.parametrize("columns", [[], ["rude"], ["rude", "rude"]])
def test_columns_are_two_different_ones(columns: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        join_label_columns(loaded({"rude": 1}), columns)
    assert [p.id for p in caught.value.problems] == ["data.bad-label-columns"]

from typing import Any

import pytest

from lora_cli.data.prompts import check_places, fill, places_of
from lora_cli.data.types import Row


@pytest.mark.parametrize(
    ("prompt", "names"),
    [
        ("{text}\nAnswer:", ("text",)),
        ("{b} {a} {b}", ("b", "a")),
        ("{title.en} {a-b}", ("title.en", "a-b")),
        ("{} { a} {a!r} {a:>9} {a[0]} {0x}", ("0x",)),
        ("no place", ()),
    ],
)
def test_places_are_plain_names(prompt: str, names: tuple[str, ...]) -> None:
    assert places_of(prompt) == names


def test_values_are_put_in_as_they_are() -> None:
    """Nothing of a value or of the prompt is run, and no value makes further places."""
    values = {"a": "{b} {a.__class__} %s $x", "b": 3, "c": [1.5, "x", True]}
    assert fill("{a}|{b}|{c}|{a.__class__!r}|{{b}}", values) == (
        "{b} {a.__class__} %s $x|3|1.5, x, true|{a.__class__!r}|{3}"
    )


@pytest.mark.parametrize("value", ["x", 0, 1.5, False, ["x"], [1, "x"]])
def test_values_that_can_be_put_in(value: Any) -> None:
    assert check_places([Row("1", {"a": value}, "f", 1)], ["a"]) == []


@pytest.mark.parametrize("value", [None, "", " ", [], [""], {"b": 1}, [None, "x"]])
def test_values_that_cannot_be_put_in(value: Any) -> None:
    rows = [Row("1", {"a": "x", "z": 1}, "f", 1), Row("2", {"a": value, "z": 1}, "f", 2)]
    (problem,) = check_places(rows, ["a", "z"])
    assert (problem.id, problem.where, problem.allowed) == (
        "data.bad-prompt-value",
        "f row 2",
        "a, z",
    )
    assert problem.message == (
        "`a` must hold a text, a number or a list of such in every row, since task.prompt has a "
        "place for it, but does not in 1 row."
    )


def test_all_columns_and_rows_are_named_at_once() -> None:
    rows = [Row(str(n), {}, "f", n) for n in range(1, 13)]
    first, second = check_places(rows, ["a", "b"])
    assert "`a`" in first.message
    assert "`b`" in second.message
    assert (first.where or "").endswith("f row 10 and 2 more")

from typing import Any

import pytest

from lora_cli.data.listing import count_rows, list_rows, show_cell, show_value
from lora_cli.data.types import Row

ROWS = [Row(str(n), {}, "d.csv", n) for n in range(1, 13)]


def test_the_first_ten_rows_are_named_and_the_others_counted() -> None:
    first = ", ".join(f"d.csv row {n}" for n in range(1, 11))
    assert list_rows(ROWS[:10]) == first
    assert list_rows(ROWS) == f"{first} and 2 more"


def test_what_was_found_stands_beside_its_row() -> None:
    assert list_rows([(ROWS[0], "null"), (ROWS[1], "")]) == "d.csv row 1 (null), d.csv row 2"


def test_rows_are_counted_in_words() -> None:
    assert [count_rows(n) for n in (1, 2)] == ["1 row", "2 rows"]


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "null"),
        (True, "true"),
        ("é", '"é"'),
        ("x" * 41, '"' + "x" * 40 + '..."'),
        (["x" * 60], '["' + "x" * 38 + "..."),
        ({"a": b"b"}, '{"a": "b\'b\'"}'),
    ],
)
def test_values_are_shown_as_in_json_and_short(value: Any, shown: str) -> None:
    assert show_value(value) == shown


def test_the_item_at_fault_is_shown_however_long_the_list() -> None:
    row = Row("1", {"c": ["a"] * 99 + [3], "d": " "}, "f", 1)
    is_text = lambda item: isinstance(item, str)  # noqa: E731
    assert show_cell(row, "c", part="word", fits=is_text) == "word 100 is 3"
    assert [show_cell(row, name) for name in ("d", "e")] == ["empty", "missing"]

"""Rows in errors: the first of them by name, what they hold, and how many they are."""

import json
from collections.abc import Callable, Sequence
from typing import Any

from lora_cli.data.types import Row

_LISTED = 10
_SHOWN = 40


def list_rows(bad: Sequence[Row] | Sequence[tuple[Row, str]]) -> str:
    """Return where the first ten rows are, each with what was found if that is given.

    >>> list_rows([Row("1", {}, "d.csv", 1)]), list_rows([(Row("1", {}, "d.csv", 1), "empty")])
    ('d.csv row 1', 'd.csv row 1 (empty)')
    """
    shown = []
    for item in bad[:_LISTED]:
        row, found = item if isinstance(item, tuple) else (item, "")
        shown.append(row.where + (f" ({found})" if found else ""))
    return list_names(shown, count=len(bad))


def list_names(names: Sequence[str], *, count: int | None = None) -> str:
    """Return the first ten names, and how many more there are of `count`, or of the names.

    >>> list_names(["a", "b"])
    'a, b'
    """
    more = (len(names) if count is None else count) - _LISTED
    return ", ".join(names[:_LISTED]) + (f" and {more} more" if more > 0 else "")


def count_rows(count: int) -> str:
    """Return a number of rows in words.

    >>> count_rows(1), count_rows(12)
    ('1 row', '12 rows')
    """
    return "1 row" if count == 1 else f"{count} rows"


def show_value(value: Any) -> str:
    """Return a value as JSON has it, cut to what a line has room for.

    >>> show_value(None), show_value("a"), show_value(["a", True])
    ('null', '"a"', '["a", true]')
    """
    if isinstance(value, str):
        return f'"{value[:_SHOWN]}..."' if len(value) > _SHOWN else f'"{value}"'
    text = json.dumps(value, ensure_ascii=False, default=str)
    return f"{text[:_SHOWN]}..." if len(text) > _SHOWN else text


def show_cell(
    row: Row, column: str, *, part: str = "", fits: Callable[[Any], Any] | None = None
) -> str:
    """Return what a row holds in a column, or what is wrong with an item of a list.

    Args:
        row: Any row.
        column: Its column.
        part: What an item of a list is called.
        fits: Tells whether an item is right; None shows the list.

    >>> row = Row("1", {"words": ["a", " "], "other": ""}, "d.csv", 1)
    >>> show_cell(row, "other"), show_cell(row, "label")
    ('empty', 'missing')
    >>> show_cell(row, "words", part="word", fits=str.strip)
    'word 2 is empty'
    """
    if column not in row.values:
        return "missing"
    value = row.values[column]
    if isinstance(value, list) and fits is not None:
        wrong = next((place for place, item in enumerate(value) if not fits(item)), None)
        if wrong is not None:
            return f"{part} {wrong + 1} is {_show(value[wrong])}"
    return _show(value)


def _show(value: Any) -> str:
    is_empty = value == [] or (isinstance(value, str) and not value.strip())
    return "empty" if is_empty else show_value(value)

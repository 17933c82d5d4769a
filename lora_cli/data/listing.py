"""Rows in errors: the first of them by name, and how many they are."""

from collections.abc import Sequence

from lora_cli.data.types import Row

_LISTED = 10


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

"""Texts that are wanted: one in each row, or several that are as good."""

from collections.abc import Sequence
from typing import Any

from lora_cli.data.types import Row
from lora_cli.errors import Problem

_LISTED = 10


def row_references(row: Row, column: str) -> tuple[str, ...] | None:
    """Return the texts in a column of a row, the best first, or None if there are none.

    A text alone is one; in a list all must be texts. A text of nothing but white space is none.
    """
    value = row.values.get(column)
    texts: list[Any] = value if isinstance(value, list) else [value]
    if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        return None
    return tuple(texts)


def check_references(rows: Sequence[Row], column: str) -> list[Problem]:
    """Return a problem if some rows have no text in `column`, and no list of texts."""
    bad = [row for row in rows if row_references(row, column) is None]
    if not bad:
        return []
    listed = ", ".join(f"{row.where} ({_fault(row, column)})" for row in bad[:_LISTED])
    more = f" and {len(bad) - _LISTED} more" if len(bad) > _LISTED else ""
    finding = "has none in 1 row" if len(bad) == 1 else f"has none in {len(bad)} rows"
    return [
        Problem(
            id="data.bad-reference",
            message=f"`{column}` must hold a text in every row, or a list of texts, but {finding}.",
            where=listed + more,
            fix="fill in the text, or remove the rows",
        )
    ]


def _fault(row: Row, column: str) -> str:
    value = row.values.get(column)
    if value is None:
        return "null" if column in row.values else "missing"
    if value in ("", []) or (isinstance(value, str) and not value.strip()):
        return "empty"
    if isinstance(value, list):
        return "a list with something else than texts"
    return f"a value of type {type(value).__name__}"

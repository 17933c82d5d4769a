"""Columns that hold a text, or the parts of one as a list: lines of a dialogue, titles read."""

from collections.abc import Sequence
from typing import Any

from lora_cli.data.listing import count_rows, list_rows, show_cell
from lora_cli.data.types import Row
from lora_cli.errors import Problem


def passage_of(value: Any, *, between: str = " ") -> str | None:
    """Return a text, or texts as one; None if it is neither.

    >>> passage_of("a b"), passage_of(["a", "b"], between="; "), passage_of([]), passage_of(3)
    ('a b', 'a; b', '', None)
    """
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        return between.join(value)
    return None


def check_passages(
    rows: Sequence[Row], column: str, *, may_be_empty: bool = False
) -> list[Problem]:
    """Return a problem if some rows have no text in `column`."""
    bad = []
    for row in rows:
        text = passage_of(row.values.get(column))
        if text is None or not (may_be_empty or text.strip()):
            bad.append((row, show_cell(row, column, part="part", fits=_is_text)))
    if not bad:
        return []
    count = count_rows(len(bad))
    return [
        Problem(
            id="data.bad-passage",
            message=f"`{column}` must hold a text, or a list of texts, in every row, but does not "
            f"in {count}.",
            where=list_rows(bad),
            allowed="a text, or a list of texts"
            + (", which may be empty" if may_be_empty else " that is not empty"),
            fix="fill in the text, or remove the rows",
        )
    ]


def _is_text(value: Any) -> bool:
    return isinstance(value, str)

"""Columns that are labels themselves: 1 in the rows that have the label, 0 in the others."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lora_cli.data.columns import list_columns
from lora_cli.data.listing import count_rows, list_rows
from lora_cli.data.sources import Loaded
from lora_cli.data.types import Row
from lora_cli.errors import Problem, UserError, nearest_name

JOINED = "label_columns"
"""Column that holds the labels of a row as a list, in place of a column for each of them."""

_KEY = "task.data.label_columns"
_TEXTS = {"1": True, "0": False, "1.0": True, "0.0": False, "true": True, "false": False}


def flag_of(value: Any) -> bool | None:
    """Return whether a value says yes or no, or None if it says neither.

    >>> flag_of(1), flag_of("0"), flag_of("True"), flag_of(-1), flag_of("")
    (True, False, True, None, None)
    """
    if isinstance(value, str):
        return _TEXTS.get(value.strip().lower())
    return bool(value) if isinstance(value, bool | int | float) and value in (0, 1) else None


def join_label_columns(loaded: Loaded, columns: Sequence[str]) -> Loaded:
    """Return the same rows with their labels as a list in the column `JOINED`.

    Args:
        loaded: Rows that have all of the columns.
        columns: Names of the labels, in order.

    Raises:
        UserError: If these are not two different columns at least, some row lacks one, or a value
            is neither 0 nor 1.
    """
    if len(columns) < 2 or len(set(columns)) < len(columns):
        raise UserError(_no_columns(columns))
    found = [row for rows in loaded.rows.values() for row in rows]
    there = list_columns(found)
    problems = [_missing(name, there) for name in columns if name not in there]
    if not problems:
        problems = [p for name in columns for p in _check_flags(found, name)]
    if problems:
        raise UserError(problems)
    joined = {
        split: tuple(replace(row, values=_joined(row, columns)) for row in rows)
        for split, rows in loaded.rows.items()
    }
    return replace(loaded, rows=joined, class_names={**loaded.class_names, JOINED: tuple(columns)})


def _joined(row: Row, columns: Sequence[str]) -> dict[str, Any]:
    rest = {name: value for name, value in row.values.items() if name not in columns}
    return {**rest, JOINED: [name for name in columns if flag_of(row.values[name])]}


def _check_flags(rows: Sequence[Row], column: str) -> list[Problem]:
    bad = [row for row in rows if flag_of(row.values.get(column)) is None]
    if not bad:
        return []
    count = count_rows(len(bad))
    return [
        Problem(
            id="data.bad-flag",
            message=f"`{column}` must be 0 or 1 in every row, but is not in {count}.",
            key=_KEY,
            where=list_rows([(row, _show(row, column)) for row in bad]),
            allowed="0, 1, true, false, also as texts",
            fix="correct the rows, or remove them",
        )
    ]


def _show(row: Row, column: str) -> str:
    value = row.values.get(column)
    if value is None:
        return "null" if column in row.values else "missing"
    return f'"{value[:20]}"' if isinstance(value, str) else str(value)[:20]


def _missing(name: str, there: Sequence[str]) -> Problem:
    nearest = nearest_name(name, there)
    return Problem(
        id="data.missing-column",
        message=f'`{_KEY}` must name columns of the data, but there is no "{name}".',
        key=_KEY,
        allowed=", ".join(there),
        fix=f'did you mean "{nearest}"?' if nearest else f"{_KEY}=[NAME,NAME]",
    )


def _no_columns(columns: Sequence[str]) -> Problem:
    return Problem(
        id="data.bad-label-columns",
        message=f"`{_KEY}` must name two or more different columns, but is "
        f"{', '.join(columns) or 'empty'}.",
        key=_KEY,
        fix=f"{_KEY}=[NAME,NAME]",
    )

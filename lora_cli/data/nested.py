"""Columns within columns, such as the languages of ``{"translation": {"en": ..., "de": ...}}``."""

from dataclasses import replace
from typing import Any

from lora_cli.data.sources import Loaded
from lora_cli.data.types import Row


def flat_row(row: Row) -> Row:
    """Return a row in which what is within a column has a name of its own, such as translation.en.

    A column that has that name already is left as it is.
    """
    if not any(isinstance(value, dict) for value in row.values.values()):
        return row
    values: dict[str, Any] = {}
    for name, value in row.values.items():
        if isinstance(value, dict):
            found = {f"{name}.{inner}": one for inner, one in value.items()}
            values |= {inner: one for inner, one in found.items() if inner not in row.values}
        else:
            values[name] = value
    return replace(row, values=values)


def flat_rows(loaded: Loaded) -> Loaded:
    """Return `flat_row` of all rows."""
    rows = {split: tuple(map(flat_row, found)) for split, found in loaded.rows.items()}
    return replace(loaded, rows=rows)

"""Columns that hold any number of labels in a row."""

from collections.abc import Sequence
from typing import Any

from lora_cli.data.columns import canonical_label
from lora_cli.data.listing import count_rows, list_rows, show_cell
from lora_cli.data.types import Row
from lora_cli.errors import Problem

# Between the labels of a row in files that know no lists, such as CSV.
SEPARATOR = ","


def labels_of(value: Any) -> tuple[str, ...] | None:
    """Return the labels that a value lists, or None if it cannot be a list of labels.

    A list holds texts or whole numbers; a text holds labels with commas between them. Both may be
    empty: a row without labels.

    >>> labels_of(["joy", "awe"]), labels_of("joy, awe"), labels_of([0, 2]), labels_of("")
    (('joy', 'awe'), ('joy', 'awe'), ('0', '2'), ())
    """
    if isinstance(value, str):
        parts = [part.strip() for part in value.split(SEPARATOR)]
        if parts == [""]:
            return ()
        return tuple(parts) if all(parts) else None
    if isinstance(value, bool) or not isinstance(value, list | int):
        return None
    labels = [canonical_label(item) for item in (value if isinstance(value, list) else [value])]
    found = tuple(label for label in labels if label is not None)
    return found if len(found) == len(labels) else None


def check_label_lists(rows: Sequence[Row], column: str) -> list[Problem]:
    """Return a problem if some rows have no list of labels, or name a label twice."""
    bad = []
    for row in rows:
        labels = labels_of(row.values.get(column))
        if labels is None or len(set(labels)) < len(labels):
            bad.append((row, show_cell(row, column, part="label", fits=canonical_label)))
    if not bad:
        return []
    count = count_rows(len(bad))
    return [
        Problem(
            id="data.bad-labels",
            message=f"`{column}` must list different labels in every row, but does not in {count}.",
            where=list_rows(bad),
            allowed='a list of texts or whole numbers, or a text such as "joy, awe"; may be empty',
            fix="correct the rows, or remove them",
        )
    ]

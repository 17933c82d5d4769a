"""Rows of one split that train has as well."""

import unicodedata
from collections.abc import Mapping, Sequence

from lora_cli.data.types import Row


def repeated_rows(
    splits: Mapping[str, tuple[Row, ...]], columns: Sequence[str]
) -> dict[str, frozenset[str]]:
    """Return the ids of the rows whose texts are those of a row of train, by split.

    Texts are equal if they differ in case, white space and compatible characters only. A split
    without such rows is left out, and so is train.

    Args:
        splits: The rows, of which one split is "train".
        columns: What is compared.
    """
    seen = {_normalise(row, columns) for row in splits["train"]}
    found = {
        split: frozenset(row.id for row in rows if _normalise(row, columns) in seen)
        for split, rows in splits.items()
        if split != "train"
    }
    return {split: ids for split, ids in found.items() if ids}


def repeat_notes(
    splits: Mapping[str, tuple[Row, ...]], repeated: Mapping[str, frozenset[str]]
) -> tuple[str, ...]:
    """Return a sentence for each split with rows that train has as well, with their number."""
    return tuple(
        f"warning: {split}: {len(ids):,} of {len(splits[split]):,} rows have the text of a row of "
        "train, on which scores say little; metrics are given without them too"
        for split, ids in repeated.items()
    )


def _normalise(row: Row, columns: Sequence[str]) -> tuple[str, ...]:
    texts = (str(row.values.get(column)) for column in columns)
    return tuple(" ".join(unicodedata.normalize("NFKC", text).casefold().split()) for text in texts)

"""Rows and splits.

Shape suffixes used across the package: B rows of a batch, T tokens of a row, C classes,
R rank of the update.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a data file, as read.

    Attributes:
        id: Stable name: the value of the file's own `id` column where every row has a different
            one, else the row number counted from 1, as text.
        values: Column name to value, in file order.
        source: File or hub data set that the row was read from.
        number: Row number in `source`, counted from 1; a header line is not counted.
    """

    id: str
    values: Mapping[str, Any]
    source: str
    number: int

    @property
    def where(self) -> str:
        """The place to name in an error, such as "train.csv row 12" or "pets/train/cat/1.png"."""
        if self.source.endswith(os.sep):
            # Rows of a folder of files: the path is the value or, once looked up, part of it.
            file = self.values.get("image", self.values.get("audio"))
            path = file.get("path") if isinstance(file, Mapping) else file
            if isinstance(path, str):
                return self.source + path
        return f"{self.source} row {self.number}"


@dataclass(frozen=True, slots=True)
class Splits:
    """The rows of a task, already checked.

    Attributes:
        rows: Split name ("train", "validation", "test") to its rows. Only splits that exist.
        state: What the task learned from the data and needs again when the adapter is loaded,
            such as label names; plain JSON values.
        notes: Decisions that were taken for the user, each one sentence, to be shown.
        repeated: Ids of the rows whose texts train has as well, by split.
    """

    rows: Mapping[str, tuple[Row, ...]]
    state: Mapping[str, Any]
    notes: tuple[str, ...] = ()
    repeated: Mapping[str, frozenset[str]] = field(default_factory=dict)

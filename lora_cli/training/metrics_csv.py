"""A table of everything that is measured, for spreadsheets."""

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class CsvTracker:
    """Writes one line for each report; a new kind of number gets a column of its own.

    Args:
        path: File to write.
        last_step: Lines after this step are removed, since a resumed run repeats them.
    """

    def __init__(self, path: Path, *, last_step: int) -> None:
        self._path = path
        self._columns = ["step"]
        self._rows: list[Mapping[str, Any]] = []
        if path.exists():
            with path.open(encoding="utf-8", newline="") as file:
                reader = csv.DictReader(file)
                self._columns = list(reader.fieldnames or self._columns)
                self._rows = [row for row in reader if _step_of(row) <= last_step]
        self._write_all()

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Add a line."""
        row = {"step": step, **values}
        self._rows.append(row)
        new = [name for name in row if name not in self._columns]
        if new:
            self._columns += new
            self._write_all()
            return
        with self._path.open("a", encoding="utf-8", newline="") as file:
            csv.DictWriter(file, self._columns, restval="").writerow(row)

    def finish(self) -> None:
        """Do nothing: every line is in the file already."""

    def _write_all(self) -> None:
        with self._path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, self._columns, restval="")
            writer.writeheader()
            writer.writerows(self._rows)


def _step_of(row: Mapping[str, Any]) -> float:
    """Return the step of a line; that of a line which was cut off is beyond every other."""
    try:
        return int(row["step"])
    except (ValueError, TypeError):
        return float("inf")

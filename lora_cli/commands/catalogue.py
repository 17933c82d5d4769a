"""Lists of what has a name: found by words, shown in columns."""

from collections.abc import Mapping, Sequence
from typing import Any

from lora_cli.commands.display import Display
from lora_cli.errors import Problem, UserError

Entry = Mapping[str, Any]


def select(entries: Sequence[Entry], search: str | None, *, what: str) -> list[Entry]:
    """Return the entries in which every word of `search` is found, in names or values.

    Args:
        entries: What there is.
        search: Words with spaces between them; case does not matter. None takes everything.
        what: Plural of what is listed, for the error.

    Raises:
        UserError: If there is none.
    """
    words = (search or "").casefold().split()
    found = [entry for entry in entries if all(word in _text(entry) for word in words)]
    if not found:
        raise UserError(
            Problem(
                id=f"{what}.none-found",
                message=f'`search` must be found in one of the {what}, but "{search}" is not.',
                key="search",
                allowed=", ".join(str(entry["name"]) for entry in entries),
                fix=f"lora-cli {what} lists them all",
            )
        )
    return found


def _text(entry: Entry) -> str:
    return " ".join(str(value) for value in entry.values()).casefold()


def show_columns(display: Display, rows: Sequence[Sequence[str]], *, indent: int = 0) -> None:
    """Write rows of text with their columns aligned, the last as wide as it is."""
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]) - 1)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        display.output(" " * indent + "  ".join([*cells, row[-1]]).rstrip())

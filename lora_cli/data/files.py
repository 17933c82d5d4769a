"""Files of rows: which layouts there are, and how a file becomes numbered rows."""

import stat
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

from lora_cli.data.cells import iter_with_cells
from lora_cli.data.columnar import iter_columnar
from lora_cli.data.parsers import PARSERS, BadRowError, Numbered
from lora_cli.data.types import Row
from lora_cli.errors import Problem, UserError

DATA_LAYOUTS = ("jsonl", "json", "csv", "tsv", "parquet", "arrow")
"""Layouts that hold columns; named as their file extensions."""

ALL_LAYOUTS = (*DATA_LAYOUTS, "txt")
"""Layouts of rows without labels: txt has a text a line, and nothing else."""

WORD_LAYOUTS = (*ALL_LAYOUTS, "conll")
"""Layouts of rows of words with tags: conll has a word a line, and so have txt and tsv here."""

_TABLE_NAMES = frozenset(("tokens", "words"))


def resolve_layout(
    path: Path, *, layouts: tuple[str, ...] = DATA_LAYOUTS, key: str = "task.data.path"
) -> str:
    """Return the layout that the extension of `path` names.

    Raises:
        UserError: If it is not one of `layouts`.
    """
    layout = path.suffix.lower().removeprefix(".")
    if layout in layouts:
        return layout
    found = f"ends in .{layout}" if layout else "has no extension"
    raise UserError(
        Problem(
            id="data.unknown-format",
            message=f'`{key}` must name a file of a known format, but "{path}" {found}.',
            key=key,
            allowed=", ".join(f".{name}" for name in layouts),
            fix="convert the file, for example to jsonl: one JSON object a line",
        )
    )


def check_is_file(path: Path, *, key: str) -> list[Problem]:
    """Return the reason why `path` cannot be opened as a regular file, if there is one."""
    try:
        mode = path.stat().st_mode
        if stat.S_ISREG(mode):
            with path.open("rb"):
                return []
    except FileNotFoundError:
        message = f'`{key}` must name a file, but there is no such file: "{path}".'
        fix = "check the path; it is relative to the recipe or to the current folder"
        return [Problem(id="data.no-such-file", message=message, key=key, fix=fix)]
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        message = f'`{key}` must name a file that can be read, but "{path}" cannot: {reason}.'
        return [Problem(id="data.unreadable", message=message, key=key, fix="check its mode")]
    kind = "a folder" if stat.S_ISDIR(mode) else "a pipe, socket or device"
    message = f'`{key}` must name a regular file, but "{path}" is {kind}.'
    fix = f"{key}=FILE"
    return [Problem(id="data.not-a-file", message=message, key=key, fix=fix)]


def iter_rows(
    source: Path | IO[bytes],
    *,
    layout: str | None = None,
    name: str | None = None,
    key: str = "input",
    keep_bytes: bool = True,
) -> Iterator[Row]:
    """Yield rows one by one, without holding more than one of them (json: all of them).

    The ids are row numbers, since whether a column of ids is unique shows only at the end.

    Args:
        source: A file, or a binary stream such as ``sys.stdin.buffer``.
        layout: One of `WORD_LAYOUTS`; None goes by the extension, and takes jsonl for a stream.
        name: What to call the source in errors; None takes the path.
        key: Configuration key that named the source, for errors.
        keep_bytes: Whether rows of Parquet and Arrow files hold bytes themselves; else they hold
            places, see `lora_cli.data.cells`.

    Raises:
        UserError: If the file cannot be opened, or at the first row that cannot be read.
    """
    if isinstance(source, Path):
        name = name or str(source)
        problems = check_is_file(source, key=key)
        if problems:
            raise UserError(problems)
        layout = layout or resolve_layout(source, layouts=WORD_LAYOUTS, key=key)
        numbered = _iter_file(source, layout, keep_bytes=keep_bytes)
    else:
        name = name or "standard input"
        layout = layout or "jsonl"
        if layout not in PARSERS:
            message = f"`{key}` must be a file for the {layout} format, but is a stream."
            allowed = ", ".join(PARSERS)
            raise UserError(
                Problem(
                    id="data.not-a-stream",
                    message=message,
                    key=key,
                    allowed=allowed,
                    fix=f"{key}=FILE.{layout}",
                )
            )
        numbered = PARSERS[layout](source)
    return _named(numbered, name)


def _iter_file(path: Path, layout: str, *, keep_bytes: bool) -> Iterator[Numbered]:
    if layout not in PARSERS:
        yield from (iter_columnar if keep_bytes else iter_with_cells)(path, layout)
        return
    with path.open("rb") as stream:
        yield from PARSERS[layout](stream)


def _named(numbered: Iterator[Numbered], name: str) -> Iterator[Row]:
    try:
        for number, values in numbered:
            yield Row(str(number), values, name, number)
    except BadRowError as error:
        subject = "it" if error.number is None else f"row {error.number}"
        raise UserError(
            Problem(
                id="data.bad-file" if error.number is None else "data.bad-row",
                message=f"`{name}` {error.rule}, but {subject} {error.finding}.",
                where=name if error.number is None else f"{name} row {error.number}",
                fix=error.fix,
            )
        ) from None


def read_file(
    path: Path,
    *,
    name: str | None = None,
    key: str = "task.data.path",
    layouts: tuple[str, ...] = DATA_LAYOUTS,
    keep_bytes: bool = True,
) -> tuple[Row, ...]:
    """Read all rows of a file in one of some layouts.

    Args:
        path: The file.
        layouts: Which it may have.
        name: What to call it in errors; None takes the path.
        key: Configuration key that named it, for errors.
        keep_bytes: As in `iter_rows`.

    Raises:
        UserError: If it cannot be opened, has no rows, or has a row that cannot be read.
    """
    problems = check_is_file(path, key=key)
    if problems:
        raise UserError(problems)
    layout = resolve_layout(path, layouts=layouts, key=key)
    if "conll" in layouts and (layout == "txt" or (layout == "tsv" and not _is_table(path))):
        layout = "conll"
    rows = tuple(iter_rows(path, layout=layout, name=name, key=key, keep_bytes=keep_bytes))
    if not rows:
        name = name or str(path)
        size = "empty" if path.stat().st_size == 0 else "without a single row"
        raise UserError(
            Problem(
                id="data.no-rows",
                message=f"`{name}` must hold rows, but is {size}.",
                key=key,
                where=name,
                fix="check how the file was written",
            )
        )
    return with_own_ids(rows)


def _is_table(path: Path) -> bool:
    """Tell a table with a row a line from sentences with blank lines between them."""
    with path.open("rb") as stream:
        first = stream.readline()
        names = {cell.strip().lower() for cell in first.decode(errors="replace").split("\t")}
        if names & _TABLE_NAMES:
            return True
        was_blank = not first.strip()
        for line in stream:
            is_blank = not line.strip()
            if was_blank and not is_blank:
                return False
            was_blank = is_blank
    return True


def with_own_ids(rows: tuple[Row, ...]) -> tuple[Row, ...]:
    """Return the rows under the ids of their `id` column, if every row has a different one."""
    ids = [_own_id(row.values.get("id")) for row in rows]
    if None in ids or len(set(ids)) < len(ids):
        return rows
    return tuple(replace(row, id=own) for row, own in zip(rows, ids, strict=True) if own)


def _own_id(value: Any) -> str | None:
    if isinstance(value, bool) or not isinstance(value, str | int):
        return None
    return str(value).strip() or None

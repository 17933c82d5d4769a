"""Images and sounds of rows, which stay in their files until a batch needs them.

A column of them holds, in each row, the path of a file, relative to the folder of the data file,
or an object with `path` and perhaps `bytes`, as the datasets library writes them. `locate` turns
either into a *place*: plain values that say where the bytes are, all that is kept of a row:

* ``{"path", "file", "size", "modified"}``: a file;
* ``{"path", "table", "column", "row", "modified"}``: a cell of an Arrow file, see `cells`, and
  ``item`` where the cell holds a list;
* ``{"path", "bytes"}``: the bytes themselves, in rows that are read one by one to be predicted.
"""

import os
import stat
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_cli.data.cells import read_cell
from lora_cli.data.listing import list_names
from lora_cli.data.types import Row
from lora_cli.errors import Problem, UserError

Place = Mapping[str, Any]

ENDINGS = {
    "image": (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm"),
    "audio": (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aiff", ".aif", ".au"),
}
"""Endings of files by what is in them, which is the name of the column too."""

# What files must be readable as, and what is allowed, for errors.
_WANTED = {
    "image": ("images", ", ".join(name.removeprefix(".") for name in ENDINGS["image"])),
    "audio": ("sounds", ", ".join(name.removeprefix(".") for name in ENDINGS["audio"])),
    "box": ("images with all of their boxes inside", "boxes with a width and a height in pixels"),
    "mask": ("masks", "images, not jpg, with the number of a class for each pixel of the picture"),
}

_FIXES = {"box": "correct the boxes, take their rows out, or cut them: task.unfit_boxes=cut"}


class MediaError(Exception):
    """A file cannot be used; the text says why, as the end of a sentence."""


class UnreadableError(UserError):
    """The files of some rows cannot be read.

    Attributes:
        kind: "image", "audio", "mask" or "box".
        found: Name and reason of each.
    """

    def __init__(self, kind: str, found: Sequence[tuple[str, str]]) -> None:
        self.kind, self.found = kind, tuple(found)
        super().__init__(_unreadable(kind, self.found))

    def __reduce__(self) -> Any:
        return type(self), (self.kind, self.found)


def locate(value: Any, source: str) -> Place:
    """Return the place of what a row holds.

    Args:
        value: Of the row's column.
        source: The data file, for paths relative to its folder.

    Raises:
        MediaError: If there is no such file.
    """
    if isinstance(value, Mapping):
        if "table" in value or "size" in value:
            return value
        if isinstance(value.get("bytes"), bytes):
            return {"path": value.get("path"), "bytes": value["bytes"]}
        value = value.get("path")
    if isinstance(value, bytes):
        return {"path": None, "bytes": value}
    if value is None:
        raise MediaError("null")
    if not isinstance(value, str):
        raise MediaError(f"a value of type {type(value).__name__} in place of a path")
    return _file_place(value, source)


def _file_place(path: str, source: str) -> Place:
    if not path.strip():
        raise MediaError("an empty path")
    # The source of a folder ends with a separator, which Path would drop.
    file = Path(os.path.dirname(source)) / Path(path).expanduser()  # noqa: PTH120
    try:
        facts = file.stat()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise MediaError(reason[:1].lower() + reason[1:]) from error
    if not stat.S_ISREG(facts.st_mode):
        raise MediaError("a folder" if stat.S_ISDIR(facts.st_mode) else "no regular file")
    if not facts.st_size:
        raise MediaError("an empty file")
    return {
        "path": path,
        "file": os.path.abspath(file),  # noqa: PTH100, links stay as they are
        "size": facts.st_size,
        "modified": facts.st_mtime_ns,
    }


def read_place(place: Place) -> bytes:
    """Return the bytes at a place.

    Raises:
        MediaError: If there are none.
    """
    if "bytes" in place:
        content = place["bytes"]
    elif "table" in place:
        content = read_cell(place["table"], place["column"], place["row"], place.get("item"))
    else:
        try:
            content = Path(place["file"]).read_bytes()
        except OSError as error:
            raise MediaError((error.strerror or str(error)).lower()) from error
    if not content:
        raise MediaError("without bytes")
    return bytes(content)


def without_place(value: Any) -> Any:
    """Return what of a row's value stays the same when its files are moved or copied."""
    if isinstance(value, list):
        return [without_place(item) for item in value]
    if isinstance(value, Mapping) and "modified" in value:
        moved = ("file", "table", "modified")
        return {name: part for name, part in value.items() if name not in moved}
    return value


def media_name(row: Row, column: str) -> str:
    """Return what to call the file of a row: its path as written, or the place of the row."""
    value = row.values.get(column)
    path = value.get("path") if isinstance(value, Mapping) and "file" in value else value
    if row.source.endswith(os.sep) and isinstance(path, str):
        return row.source + path
    return f"{path} of {row.where}" if isinstance(path, str) and path else row.where


def list_places(
    rows: Sequence[Row], column: str
) -> tuple[list[Place | None], list[tuple[str, str]]]:
    """Look up the files of rows, without opening any.

    Returns:
        The place of each row, None where there is no file; and name and reason of these rows.
    """
    places: list[Place | None] = []
    faults = []
    for row in rows:
        try:
            places.append(locate(row.values.get(column), row.source))
        except MediaError as error:
            places.append(None)
            faults.append((media_name(row, column), str(error)))
    return places, faults


def read_media(row: Row, column: str, kind: str, read: Callable[[bytes], Any]) -> tuple[Place, Any]:
    """Return the place of a row's file, and what `read` makes of its bytes.

    Raises:
        UnreadableError: If the file is missing, or `read` raises MediaError.
    """
    try:
        place = locate(row.values.get(column), row.source)
        return place, read(read_place(place))
    except MediaError as error:
        raise UnreadableError(kind, [(media_name(row, column), str(error))]) from error


def _unreadable(kind: str, found: Sequence[tuple[str, str]]) -> Problem:
    what, allowed = _WANTED[kind]
    count = f"{len(found):,} cannot be" if len(found) > 1 else "one cannot be"
    return Problem(
        id=f"data.bad-{kind}",
        message=f"All files of the rows must be there and be readable as {what}, but {count}.",
        where=list_names([f"{name} ({reason})" for name, reason in found]),
        allowed=allowed,
        fix=_FIXES.get(kind, "replace these files, or take their rows out of the data"),
    )

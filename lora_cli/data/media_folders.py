"""Folders of images or sounds, laid out as the datasets library has its imagefolder.

``train/cat/1.png`` is a row of the split train with the label cat; the folder of a split may be
left out (``cat/1.png``), and a ``metadata.csv`` or ``metadata.jsonl`` in place of the folders of
labels has a row for each file, whose column ``file_name`` is its path from there.
"""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from lora_cli.data.files import read_file
from lora_cli.data.listing import list_names
from lora_cli.data.media import ENDINGS
from lora_cli.data.types import Row
from lora_cli.errors import Problem, UserError

SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
}
_METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
_FILE_NAME = "file_name"
_LABEL = "label"


def is_media_folder(folder: Path, kind: str) -> bool:
    """Whether a folder holds such files, in it or up to two folders further down, or metadata."""
    if any(_metadata(part) for part in (folder, *_folders(folder))):
        return True
    return any(
        _files(part, kind)
        for first in (folder, *_folders(folder))
        for part in ((first,) if first == folder else (first, *_folders(first)))
    )


def read_media_folder(
    folder: Path, kind: str, *, file_split: str, key: str
) -> tuple[Mapping[str, tuple[Row, ...]], tuple[str, ...]]:
    """Return the rows of a folder by split, with the files in a column called `kind`.

    Args:
        folder: Where the files are.
        kind: "image" or "audio".
        file_split: What a folder without splits is.
        key: Configuration key that named it, for errors.

    Returns:
        The rows, and a sentence about files that were left out.

    Raises:
        UserError: If there are splits and other folders, or metadata cannot be read.
    """
    metadata = _metadata(folder)
    if metadata is not None:
        whole = _read_metadata(metadata, kind, base=folder, key=key)
        rows, read = _by_first_folder(whole, kind, file_split), list_media(folder, kind)
    else:
        rows, read = {}, []
        for split, part in _splits(folder, kind, file_split=file_split, key=key).items():
            found = _metadata(part)
            read += list_media(part, kind)
            rows[split] = (
                _by_label(part, kind, base=folder)
                if found is None
                else _read_metadata(found, kind, base=folder, key=key)
            )
    used = {row.values[kind] for found in rows.values() for row in found}
    unused = [name for path in read if (name := path.relative_to(folder).as_posix()) not in used]
    if not unused:
        return rows, ()
    return rows, (f"left out {len(unused):,} files without a row or label: {list_names(unused)}",)


def _metadata(folder: Path) -> Path | None:
    return next((path for name in _METADATA if (path := folder / name).is_file()), None)


def _by_first_folder(
    rows: tuple[Row, ...], kind: str, file_split: str
) -> dict[str, tuple[Row, ...]]:
    """Share out the rows of one metadata file, where all files are in the folder of a split."""
    parts = [SPLIT_NAMES.get(str(row.values[kind]).split("/")[0].lower()) for row in rows]
    if None in parts:
        return {file_split: rows}
    return {
        split: tuple(row for row, part in zip(rows, parts, strict=True) if part == split)
        for split in ("train", "validation", "test")
        if split in parts
    }


def list_media(folder: Path, kind: str) -> list[Path]:
    """Return all such files below a folder, in order of name."""
    found: list[Path] = []
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(place, name) for name in sorted(names) if _is_media(name, kind)]
    return sorted(found)


def count_media(folder: Path) -> dict[str, int]:
    """Return how many such files of each kind are below a folder."""
    return {kind: len(list_media(folder, kind)) for kind in ENDINGS}


def media_rows(folder: Path, files: list[Path], kind: str) -> tuple[Row, ...]:
    """Return a row for each file, named by its path from the folder."""
    source = f"{folder}{os.sep}"
    names = [path.relative_to(folder).as_posix() for path in files]
    return tuple(
        Row(name, {kind: name}, source, number) for number, name in enumerate(names, start=1)
    )


def rows_of_media(path: Path) -> tuple[Row, ...]:
    """Return a row for a file, or for each file below a folder; none where there are no such.

    The column is called after what most of the files are, "image" or "audio".
    """
    if path.is_dir():
        found = count_media(path)
        kind = max(found, key=lambda name: found[name])
        return media_rows(path, list_media(path, kind), kind)
    kinds = [kind for kind in ENDINGS if path.is_file() and _is_media(path.name, kind)]
    return media_rows(path.parent, [path], kinds[0]) if kinds else ()


def _splits(folder: Path, kind: str, *, file_split: str, key: str) -> dict[str, Path]:
    """Return the folders of the splits; the folder itself where there are none."""
    named = {part: SPLIT_NAMES.get(part.name.lower()) for part in _folders(folder)}
    known = [part for part, split in named.items() if split is not None]
    # A class may be called "train": its folder holds the files themselves, as the others do.
    if not known or (len(known) < len(named) and all(_files(part, kind) for part in known)):
        return {file_split: folder}
    splits = {str(named[part]): part for part in known}
    strangers = [part.name for part, split in named.items() if split is None]
    if strangers or len(splits) < len(known):
        raise UserError(
            Problem(
                id="data.folders",
                message=f"`{key}` must name a folder of train, validation and test, or one of a "
                f"folder for each label, but has {list_names([part.name for part in named])}.",
                key=key,
                where=str(folder),
                fix="put the folders of labels into one folder for each split",
            )
        )
    order = ("train", "validation", "test")
    return {split: splits[split] for split in order if split in splits}


def _by_label(part: Path, kind: str, *, base: Path) -> tuple[Row, ...]:
    """Return the rows of the folders of labels, or those of the folder itself, without labels."""
    labels = _folders(part)
    files = [path for label in labels or [part] for path in list_media(label, kind)]
    rows = media_rows(base, files, kind)
    if not labels:
        return rows
    names = [path.relative_to(part).parts[0] for path in files]
    return tuple(
        replace(row, values={**row.values, _LABEL: name})
        for row, name in zip(rows, names, strict=True)
    )


def _read_metadata(path: Path, kind: str, *, base: Path, key: str) -> tuple[Row, ...]:
    """Return the rows of a metadata file, with paths from `base`."""
    rows = read_file(path, key=key)
    if any(_FILE_NAME not in row.values for row in rows):
        raise UserError(
            Problem(
                id="data.no-file-name",
                message=f"`{path.name}` must have a column {_FILE_NAME} with the file of each "
                f"row, but has {', '.join(rows[0].values)}.",
                where=str(path),
                fix=f"call the column with the paths {_FILE_NAME}",
            )
        )
    source, inside = f"{base}{os.sep}", path.parent.relative_to(base)
    found = []
    for row in rows:
        name = row.values[_FILE_NAME]
        values = {other: value for other, value in row.values.items() if other != _FILE_NAME}
        file = (inside / name).as_posix() if isinstance(name, str) and name else name
        found.append(Row(str(file), {kind: file, **values}, source, row.number))
    ids = {row.id for row in found}
    if len(ids) < len(found):
        return tuple(replace(row, id=str(row.number)) for row in found)
    return tuple(found)


def _folders(folder: Path) -> list[Path]:
    return sorted(
        path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")
    )


def _files(folder: Path, kind: str) -> bool:
    return any(_is_media(path.name, kind) for path in folder.iterdir() if path.is_file())


def _is_media(name: str, kind: str) -> bool:
    return not name.startswith(".") and Path(name).suffix.lower() in ENDINGS[kind]

"""Where rows come from: a file, a folder of splits, the cache, a package, or the hub."""

import os
import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from lora_cli import packages
from lora_cli.config.tasks import DataConfig
from lora_cli.data.cache import cache_folder
from lora_cli.data.columnar import load_class_names
from lora_cli.data.files import (
    DATA_LAYOUTS,
    WORD_LAYOUTS,
    check_is_file,
    read_file,
    resolve_layout,
    with_own_ids,
)
from lora_cli.data.hub import load_hub_rows
from lora_cli.data.media_folders import (
    SPLIT_NAMES,
    count_media,
    is_media_folder,
    read_media_folder,
)
from lora_cli.data.types import Row
from lora_cli.errors import Problem, UserError

KEY = "task.data.path"
CACHE_PREFIX = "cache://"

_CACHE_COMMANDS = {"movie-reviews": "python -m lora_cli.data.movie_reviews"}
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
# Endings that only a file has: a path with one of them is never looked up on the hub.
_FILE_ENDINGS = frozenset(
    (*(f".{layout}" for layout in WORD_LAYOUTS), ".py", ".pkl", ".pickle", ".pt", ".bin")
) | {".zip", ".gz", ".tar", ".tgz", ".xz", ".bz2", ".zst", ".xls", ".xlsx", ".ndjson", ".npy"}
# Notes that tools leave beside data files.
_NOT_DATA = frozenset(
    ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "readme.json")
)


@dataclass(frozen=True, slots=True)
class Loaded:
    """Rows as they were found, before any choice.

    Attributes:
        rows: Split name to its rows; the usual other names of train, validation and test are
            replaced by these.
        class_names: Column to its label names in order, where the source declares them.
        notes: What was done for the user, one sentence each.
    """

    rows: Mapping[str, tuple[Row, ...]]
    class_names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def load_rows(
    config: DataConfig,
    *,
    file_split: str = "train",
    layouts: tuple[str, ...] = DATA_LAYOUTS,
    media: str | None = None,
) -> Loaded:
    """Read every split of `config.path`.

    An existing file or folder comes first, then ``cache://`` and ``pkg://``, then the hub; what
    looks like a path and does not exist is never looked up on the hub.

    Args:
        config: Where the rows are.
        file_split: Split that the rows of a single file are.
        layouts: Those that files may have.
        media: What rows hold in files of their own, "image" or "audio"; a folder may then be one
            of these files, see `media_folders`.

    Raises:
        UserError: If there are no such rows, or some cannot be read.
    """
    source = config.path
    if not source:
        raise UserError(
            Problem(
                id="data.no-source",
                message=f"`{KEY}` must say where the rows are, but is empty.",
                key=KEY,
                allowed="a file, a folder of train, validation and test files, or a hub data set",
                fix=f"{KEY}=FILE, or task=movie_reviews for rows that need no hub",
            )
        )
    path = find_path(source)
    if path is not None:
        if path.is_dir():
            if media is not None and not _has_split_files(path) and is_media_folder(path, media):
                found, notes = read_media_folder(path, media, file_split=file_split, key=KEY)
                return Loaded(rows=found, notes=notes)
            return _load_folder(path, layouts, keep_bytes=media is None)
        rows = read_file(path, key=KEY, layouts=layouts, keep_bytes=media is None)
        return Loaded(rows={file_split: rows}, class_names=_class_names([path]))
    hub = load_hub_rows(source, name=config.name, revision=config.revision)
    return Loaded(rows=hub.rows, class_names=hub.class_names, notes=hub.notes)


def find_path(source: str) -> Path | None:
    """Return the local path that `source` means, or None if it is the name of a hub data set.

    Raises:
        UserError: If it is neither.
    """
    if source.startswith(CACHE_PREFIX):
        return _resolve_cache(source)
    if source.startswith(packages.PREFIX):
        return packages.resolve_package_path(source, key=KEY)
    path = Path(source).expanduser()
    # Unlike `Path.exists`, this says of a name that is too long that it is not there.
    if os.path.exists(path):  # noqa: PTH110
        return path
    is_path = source[0] in "./~\\" or path.suffix.lower() in _FILE_ENDINGS
    if not is_path and _HUB_ID.fullmatch(source):
        return None
    raise UserError(
        Problem(
            id="data.no-such-file",
            message=f'`{KEY}` must name a file or folder, but there is no such file: "{source}".',
            key=KEY,
            fix="check the path; it is relative to the recipe or to the current folder",
        )
    )


def _resolve_cache(source: str) -> Path:
    name = source.removeprefix(CACHE_PREFIX).rstrip("/")
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,63}", name):
        raise UserError(
            Problem(
                id="data.bad-cache-name",
                message=f'`{KEY}` must have the form {CACHE_PREFIX}name, but is "{source}".',
                key=KEY,
                allowed="letters, digits, - _ and . in the name",
                fix=_CACHE_COMMANDS["movie-reviews"] + f", then {KEY}={CACHE_PREFIX}movie-reviews",
            )
        )
    path = cache_folder() / name
    if path.is_dir():
        return path
    raise UserError(
        Problem(
            id="data.not-in-cache",
            message=f"`{KEY}` must name a data set in the cache, but {name} is not there.",
            key=KEY,
            where=str(path),
            fix=_CACHE_COMMANDS.get(name, f"{KEY}=FILE"),
        )
    )


def _class_names(paths: list[Path]) -> dict[str, tuple[str, ...]]:
    columnar = (path for path in paths if path.suffix.lower() in (".parquet", ".arrow"))
    found: dict[str, tuple[str, ...]] = {}
    for path in columnar:
        found |= load_class_names(path, resolve_layout(path, key=KEY))
    return found


def _load_folder(folder: Path, layouts: tuple[str, ...], *, keep_bytes: bool) -> Loaded:
    files = _group_by_split(folder, layouts)
    problems = [problem for paths in files.values() for problem in _check_split(paths)]
    if not files:
        endings = ", ".join(f".{layout}" for layout in layouts)
        held = count_media(folder)
        kind = max(held, key=lambda name: held[name])
        others = f" of rows, and {held[kind]:,} {kind} files" if held[kind] else ""
        problems = [
            Problem(
                id="data.no-files",
                message=f'`{KEY}` must name a folder with data files, but "{folder}" has '
                f"none{others}.",
                key=KEY,
                allowed=f"train, validation and test, each ending in one of {endings}",
                fix=f"a task that reads such files: task={kind}_classification"
                if others
                else f"{KEY}=FILE",
            )
        ]
    if problems:
        raise UserError(problems)
    read = partial(read_file, key=KEY, layouts=layouts, keep_bytes=keep_bytes)
    rows = {split: _read_shards(paths, read) for split, paths in files.items()}
    return Loaded(rows=rows, class_names=_class_names([p for ps in files.values() for p in ps]))


def _read_shards(paths: list[Path], read: Callable[[Path], tuple[Row, ...]]) -> tuple[Row, ...]:
    if len(paths) == 1:
        return read(paths[0])
    rows = [row for path in paths for row in read(path)]
    # Row numbers start again in each shard, and so must not be the ids.
    numbered = (replace(row, id=str(place)) for place, row in enumerate(rows, start=1))
    return with_own_ids(tuple(numbered))


def _has_split_files(folder: Path) -> bool:
    """Whether there are files of rows beside the folders: then these say what the rows are."""
    return any(
        path.stem.lower() in SPLIT_NAMES or _SHARD.fullmatch(path.stem)
        for path in folder.iterdir()
        if path.suffix.lower().removeprefix(".") in DATA_LAYOUTS
    )


def _group_by_split(folder: Path, layouts: tuple[str, ...]) -> dict[str, list[Path]]:
    """Return the data files of a folder by split, sorted, with the usual split names first."""
    groups: dict[str, list[Path]] = defaultdict(list)
    for path in sorted(folder.iterdir()):
        name = path.name.lower()
        if name.startswith((".", "readme", "licen")) or name in _NOT_DATA or path.is_dir():
            continue
        shard = _SHARD.fullmatch(path.stem)
        stem = (shard[1] if shard else path.stem).lower()
        known = path.suffix.lower().removeprefix(".") in layouts
        # Where words have tags, text is more likely a list of tags or a note than a split.
        if "conll" in layouts and path.suffix.lower() == ".txt" and stem not in SPLIT_NAMES:
            continue
        if known:
            groups[SPLIT_NAMES.get(stem, shard[1] if shard else path.stem)].append(path)
        elif stem in SPLIT_NAMES:
            # A split in a layout that is not read, rather than some other kind of file.
            resolve_layout(path, layouts=layouts, key=KEY)
    order = ("train", "validation", "test")
    return {
        name: groups[name] for name in (*order, *sorted(set(groups) - set(order))) if name in groups
    }


def _check_split(paths: list[Path]) -> list[Problem]:
    """Return what is wrong with the files of one split: two for one name, or a missing shard."""
    problems = [problem for path in paths for problem in check_is_file(path, key=KEY)]
    shards = [_SHARD.fullmatch(path.stem) for path in paths]
    names = ", ".join(path.name for path in paths)
    if len(paths) == 1 and shards[0] is None:
        return problems
    kinds = {
        (shard[1], shard[3], path.suffix)
        for path, shard in zip(paths, shards, strict=True)
        if shard
    }
    if len(kinds) != 1 or None in shards:
        message = f"`{KEY}` must name a folder with one file a split, but one split has {names}."
        fix = "keep one of them in the folder, or name it: " + f"{KEY}={paths[0]}"
        problem = Problem(
            id="data.two-files", message=message, key=KEY, where=str(paths[0].parent), fix=fix
        )
        return [*problems, problem]
    numbers = [int(shard[2]) for shard in shards if shard]
    total = int(next(iter(kinds))[1])
    missing = sorted(set(range(total)) - set(numbers))
    if missing or len(numbers) != total:
        message = f"`{KEY}` must name a folder with all {total} parts of a split, but has {names}."
        problem = Problem(
            id="data.missing-shard",
            message=message,
            key=KEY,
            where=str(paths[0].parent),
            fix="download the missing parts: " + ", ".join(f"{number:05d}" for number in missing),
        )
        return [*problems, problem]
    return problems

"""Which values are paths of files, and what a relative one is relative to."""

import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from lora_cli.config.quoting import escape_references
from lora_cli.config.schema import all_keys, select

_HUB_KEYS = {"model.path", "task.data.path", "base"}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_WORDS = {"trainer.resume": {"never", "auto"}, "task.chat_template": {"chatml", "alpaca"}}
_FILE_SUFFIXES = {
    ".csv",
    ".tsv",
    ".json",
    ".jsonl",
    ".parquet",
    ".arrow",
    ".txt",
    ".conll",
    ".gguf",
}


def absolute_path(name: str, value: Any, folder: Path) -> Any:
    """Make the value of a path setting, or each of a list of them, absolute.

    What is no path of a file stays as it is: null, ``-`` for stdin, sources such as ``pkg://...``,
    references, words that mean something, and names of the model hub, which look like paths that
    do not exist.

    Args:
        name: The setting.
        value: Its value.
        folder: What a relative path is relative to.
    """
    if isinstance(value, list):
        return [absolute_path(name, item, folder) for item in value]
    if not isinstance(value, str) or value in {"", "-"} or "://" in value or value[:2] == "${":
        return value
    if Path(value).is_absolute() or value in _WORDS.get(name, ()):
        return value
    joined = Path(os.path.normpath(folder.resolve() / value))
    may_be_hub = name in _HUB_KEYS and Path(value).suffix.lower() not in _FILE_SUFFIXES
    if may_be_hub and _HUB_ID.fullmatch(value) and not joined.exists():
        return value
    return str(joined)


def fix_recorded_paths(plain: Mapping[str, Any], command: str) -> None:
    """Make the paths that a run writes down absolute, in place: they must mean the same anywhere.

    Args:
        plain: A configuration as nested dicts.
        command: Its subcommand.
    """
    for name, key in all_keys(command).items():
        section, _, last = name.rpartition(".")
        node = select(plain, section) if section else plain
        recorded = key.is_path and (name.startswith(("model.", "task.")) or name == "adapter")
        if recorded and isinstance(node, dict) and last in node:
            node[last] = absolute_path(name, node[last], Path.cwd())


def make_absolute(
    node: dict[str, Any], prefix: str, *, paths: Collection[str], folder: Path
) -> None:
    """Make the paths in the body of a recipe absolute, in place.

    Args:
        node: Settings, nested.
        prefix: Dotted name of the section that `node` is, with a dot at its end.
        paths: Names of the path settings.
        folder: The folder of the recipe.
    """
    for key, value in node.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            make_absolute(value, f"{name}.", paths=paths, folder=folder)
        elif name in paths:
            node[key] = _for_recipe(name, value, folder)


def _for_recipe(name: str, value: Any, folder: Path) -> Any:
    """Return an absolute path in which the folder, too, means what it says."""
    if isinstance(value, list):
        return [_for_recipe(name, item, folder) for item in value]
    absolute = absolute_path(name, value, folder)
    if absolute == value or "${" in value:
        return absolute
    return escape_references(absolute)

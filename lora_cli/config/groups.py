"""The config groups on disk: which there are, what each option says, and which keys it sets."""

import re
from collections.abc import Collection, Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from lora_cli.config.commands import VARIANTS
from lora_cli.config.schema import default_variant, flatten, package_folder

_BASE_ENTRY = re.compile(r"/_base/\w+/(\w+)@_here_")
# Options of an error, where all fit into two lines, and of more than these.
_SHOWN, _NEAREST = 24, 8


def configs_dir() -> Path:
    """Return the folder of the config groups that lora-cli comes with."""
    return package_folder("configs")


def group_names() -> list[str]:
    """Return the names of all config groups, sorted."""
    return sorted(path.name for path in configs_dir().iterdir() if path.is_dir())


def group_options(group: str, extra: Path | None = None) -> dict[str, Path]:
    """Return the files of a config group by option name.

    Args:
        group: Name of the group, such as ``task``.
        extra: Folder given with `--config-dir`; ours win where both have a name.
    """
    folders = [folder / group for folder in (extra, configs_dir()) if folder is not None]
    files = {path.stem: path for folder in folders for path in sorted(folder.glob("*.yaml"))}
    return dict(sorted(files.items()))


def describe_option(path: Path) -> str:
    """Return the comment on the first line of a YAML file, or nothing."""
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    return first.removeprefix("#").strip() if first.startswith("#") else ""


def read_mapping(path: Path) -> dict[str, Any]:
    """Return the content of a config file as plain values; the file was scanned or is ours."""
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    return content if isinstance(content, dict) else {}


def default_options(command: str) -> dict[str, str | None]:
    """Return the groups of a command, in order, with the option that is taken by default."""
    options: dict[str, str | None] = {}
    for entry in read_mapping(configs_dir() / f"{command}.yaml")["defaults"]:
        if isinstance(entry, Mapping):
            options |= {key: value for key, value in entry.items() if " " not in key}
    return options


def _chain(group: str, option: str | None, extra: Path | None) -> Iterator[tuple[Path, Any]]:
    """Yield the file of an option and its content, then those of the options it starts from."""
    options, waiting, seen = group_options(group, extra), [option], set[str | None]()
    while waiting:
        name = waiting.pop()
        path = options.get(name or "")
        if path is None or name in seen:
            continue
        seen.add(name)
        content = read_mapping(path)
        yield path, content
        entries = content.get("defaults") or []
        waiting.extend(entry for entry in reversed(entries) if isinstance(entry, str))


def option_origins(group: str, option: str | None, extra: Path | None = None) -> dict[str, Path]:
    """Return the keys that an option sets by dotted name, each with the file that sets it."""
    origins: dict[str, Path] = {}
    for path, content in _chain(group, option, extra):
        body = {key: value for key, value in content.items() if key != "defaults"}
        origins = dict.fromkeys(flatten(body, f"{group}."), path) | origins
    return origins


def option_values(group: str, option: str) -> dict[str, Any]:
    """Return the settings of one of our options by dotted name, without those of its variant."""
    values: dict[str, Any] = {}
    for _, content in _chain(group, option, None):
        body = {key: value for key, value in content.items() if key != "defaults"}
        values = flatten(body, f"{group}.") | values
    return values


def list_options(group: str, options: Collection[str], *, like: str = "") -> str:
    """Return options of a config group for an error; of many, some, and how to see all.

    Args:
        group: "model" or "task", where there are many.
        options: All of them.
        like: What was asked for; options that look like it are shown.
    """
    if len(options) <= _SHOWN:
        return ", ".join(options)
    found = get_close_matches(like, options, n=_NEAREST, cutoff=0.3) or list(options)[:_NEAREST]
    return f"{', '.join(found)} or another of {len(options)}: lora-cli {group}s lists them"


def option_variant(group: str, option: str | None, extra: Path | None = None) -> str:
    """Return which variant of a section an option starts from."""
    for _, content in _chain(group, option, extra):
        tag = content.get(VARIANTS[group][0])
        if isinstance(tag, str):
            return tag
        for entry in content.get("defaults") or []:
            if isinstance(entry, str) and (base := _BASE_ENTRY.fullmatch(entry)):
                return base[1]
    return default_variant(group)

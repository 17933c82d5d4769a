"""Recipes and other YAML of strangers: data that is scanned before anything composes it.

Hydra can be told by a config file to import and call any Python function, to read other files, and
to look up environment variables. A recipe can ask for none of it: it is read as text, its events
are checked here one by one, and only then is it composed, from memory, so that the files beside it
are never looked at.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from lora_cli.config.groups import group_options, list_options
from lora_cli.config.scan import place, read_text, refusal, scan
from lora_cli.config.schema import package_folder
from lora_cli.errors import Problem, UserError, nearest_name

MAX_FILES = 500

_OPTION_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """A recipe that has passed the scan.

    Attributes:
        path: The file.
        shown: Its path as the user gave it.
        text: Its content.
        defaults: Its list of groups and options in order; ``_self_`` stands as ("_self_", None).
        lines: Line number of each key, by dotted name.
    """

    path: Path
    shown: str
    text: str
    defaults: tuple[tuple[str, str | None], ...]
    lines: Mapping[str, int] = field(default_factory=dict)


def shipped_recipes() -> dict[str, Path]:
    """Return the recipes that lora-cli comes with by name."""
    return {path.stem: path for path in sorted(package_folder("recipes").glob("*.yaml"))}


def find_recipe(subject: str) -> Path:
    """Return the file that a user names: a path, or the name of a recipe that we come with.

    Raises:
        UserError: If there is no such file.
    """
    path = Path(subject)
    if path.exists():
        return path
    shipped = shipped_recipes()
    name = path.name.removesuffix(".yaml")
    if name in shipped and str(path.parent) in {".", "recipes"}:
        return shipped[name]
    near = nearest_name(name, shipped)
    raise UserError(
        Problem(
            id="recipe.not-found",
            message=f'The recipe must be a YAML file, but there is none at "{subject}".',
            allowed=f"a file, or one of {', '.join(shipped)}",
            fix=f'did you mean "{near}"?' if near else "check the path; settings are key=value",
        )
    )


def read_recipe(path: Path, *, groups: Sequence[str], extra: Path | None = None) -> Recipe:
    """Read and scan a recipe.

    Args:
        path: The file.
        groups: Config groups that the command has.
        extra: Folder given with `--config-dir`, whose options may be chosen as well.

    Raises:
        UserError: With everything in the file that is refused.
    """
    shown = str(path)
    text = read_text(path, shown)
    root = scan(text, shown)
    lines: dict[str, int] = {}
    defaults: tuple[tuple[str, str | None], ...] = ()
    if root is not None:
        for key, value in root.value:
            if key.value == "defaults":
                defaults = _read_defaults(value, shown, groups=groups, extra=extra)
        _collect_lines(root, "", lines)
    return Recipe(path=path, shown=shown, text=text, defaults=defaults, lines=lines)


def scan_folder(folder: Path) -> None:
    """Scan every YAML file of a `--config-dir`.

    Raises:
        UserError: With everything that is refused in any of them.
    """
    if not folder.is_dir():
        raise UserError(
            Problem(
                id="recipe.not-found",
                message=f'`--config-dir` must be a folder, but "{folder}" is none.',
            )
        )
    problems: list[Problem] = []
    for number, path in enumerate(_iter_yaml(folder)):
        if number >= MAX_FILES:
            raise UserError(
                refusal(f"at most {MAX_FILES} YAML files", "larger", str(folder), what="A folder")
            )
        try:
            problems.extend(_scan_option(path, folder))
        except UserError as error:
            problems.extend(error.problems)
    if problems:
        raise UserError(problems)


def _iter_yaml(folder: Path) -> Iterator[Path]:
    for root, _, names in os.walk(folder, followlinks=True):
        for name in sorted(names):
            if name.endswith((".yaml", ".yml")):
                yield Path(root, name)


def _scan_option(path: Path, folder: Path) -> Iterator[Problem]:
    group = "/".join(path.relative_to(folder).parent.parts)
    ours = group_options(group) if group else {}
    shown = str(path)
    root = scan(read_text(path, shown), shown)
    if group and not ours:
        yield refusal("folders named after config groups", f'"{group}"', shown, what="A folder")
    elif path.stem in ours:
        yield refusal(
            "options with names of their own", f'"{group}={path.stem}"', shown, what="A folder"
        )
    elif root is not None and group:
        yield from _bad_parents(root, shown)


def _bad_parents(root: MappingNode, shown: str) -> Iterator[Problem]:
    for key, value in root.value:
        if key.value != "defaults":
            continue
        entries = value.value if isinstance(value, SequenceNode) else [value]
        for entry in entries:
            plain = isinstance(entry, ScalarNode) and (
                entry.value == "_self_" or _OPTION_NAME.fullmatch(entry.value)
            )
            if not plain:
                yield refusal(
                    "names of options beside it", "other", place(shown, entry), "`defaults`"
                )


def _collect_lines(node: MappingNode, prefix: str, lines: dict[str, int]) -> None:
    for key, value in node.value:
        name = f"{prefix}{key.value}"
        lines[name] = key.start_mark.line + 1
        if isinstance(value, MappingNode):
            _collect_lines(value, f"{name}.", lines)


def _read_defaults(
    node: Node, shown: str, *, groups: Sequence[str], extra: Path | None
) -> tuple[tuple[str, str | None], ...]:
    entries: list[tuple[str, str | None]] = []
    problems: list[Problem] = []
    if not isinstance(node, SequenceNode):
        raise UserError(refusal("a list as `defaults`", "something else", place(shown, node)))
    for item in node.value:
        if isinstance(item, ScalarNode) and item.value == "_self_":
            entries.append(("_self_", None))
        elif isinstance(item, MappingNode) and len(item.value) == 1:
            key, value = item.value[0]
            problem = _check_entry(key, value, shown, groups=groups, extra=extra)
            problems.extend([problem] if problem else [])
            option = None if value.tag.endswith(":null") else value.value
            entries.append((key.value, option))
        else:
            problems.append(
                refusal("`- group: option` in `defaults`", "something else", place(shown, item))
            )
    names = [name for name, _ in entries]
    for name in sorted({name for name in names if names.count(name) > 1}):
        problems.append(refusal("each group once", f'"{name}" again', place(shown, node)))
    if problems:
        raise UserError(problems)
    return tuple(entries)


def _check_entry(
    key: Node, value: Node, shown: str, *, groups: Sequence[str], extra: Path | None
) -> Problem | None:
    name = str(key.value)
    if name not in groups:
        near = nearest_name(name, groups)
        return Problem(
            id="recipe.refused",
            message=f'`defaults` must name config groups, but "{name}" is none.',
            where=place(shown, key),
            allowed=", ".join(groups) or "none: this command has no groups",
            fix=f'did you mean "{near}"?' if near else None,
        )
    if not isinstance(value, ScalarNode):
        return refusal("one option of each group", "something else", place(shown, value))
    options = list(group_options(name, extra))
    if value.tag.endswith(":null") or value.value in options:
        return None
    return unknown_option(name, value.value, options, where=place(shown, value))


def unknown_option(
    group: str, option: str, options: Sequence[str], *, where: str | None = None
) -> Problem:
    """Describe a choice that a config group does not have."""
    near = nearest_name(option, options)
    return Problem(
        id="config.unknown-option",
        message=f'`{group}` must be an option of its config group, but is "{option}".',
        key=group,
        where=where,
        allowed=list_options(group, options, like=option),
        fix=f'did you mean "{near}"?' if near else None,
    )

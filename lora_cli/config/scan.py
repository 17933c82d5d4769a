"""The scan that every YAML text of a stranger passes before anything else looks at it.

A config file could ask Hydra to import and call any Python function, to read other files, and to
look up environment variables; a few hundred bytes of YAML can ask for gigabytes. What could do so
is refused here, event by event.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from lora_cli.errors import Problem, UserError

MAX_BYTES = 256 * 1024
MAX_DEPTH = 20
MAX_EVENTS = 20_000
MAX_REFERENCES = 16

_REFERENCE = re.compile(r"\$\{\.*[A-Za-z_]\w*(\.\w+)*\}")
_SPECIAL_KEY = re.compile(r"_\w+_|<<")
_PACKAGE_HEADER = re.compile(r"^\s*#\s*@", re.MULTILINE)
_HARMLESS_TAGS = {None, "!"}


def read_text(path: Path, shown: str) -> str:
    """Read a YAML file of a stranger.

    Raises:
        UserError: If it is no regular file, too large or not UTF-8 text.
    """
    fault = None
    try:
        if not path.is_file():
            fault = "a folder" if path.is_dir() else "no regular file"
        elif path.stat().st_size > MAX_BYTES:
            fault = f"{path.stat().st_size} bytes long"
        else:
            return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        fault = f"unreadable ({error.strerror})"
    except UnicodeDecodeError:
        fault = "not text"
    raise UserError(
        Problem(
            id="recipe.unreadable",
            message=f"A recipe must be a YAML file of at most {MAX_BYTES // 1024} KiB,"
            f" but this is {fault}.",
            where=shown,
        )
    )


def refusal(wanted: str, found: str, where: str, what: str = "A recipe") -> Problem:
    """Describe something that a recipe must not have."""
    return Problem(
        id="recipe.refused",
        message=f"{what} must have {wanted}, but here is {found}.",
        where=where,
        fix="a recipe holds `defaults` with `- group: option`, and settings; nothing else",
    )


def place(shown: str, item: Node | yaml.Event) -> str:
    """Return file and line of a part of a YAML text, for an error."""
    mark = item.start_mark
    return f"{shown}:{mark.line + 1}" if mark else shown


def scan(text: str, shown: str) -> MappingNode | None:
    """Check a YAML text and return its syntax tree; None when it is empty.

    Raises:
        UserError: With everything in it that is refused.
    """
    _scan_events(text, shown)
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    problems = []
    if header := _PACKAGE_HEADER.search(text):
        line = text.count("\n", 0, header.end()) + 1
        problems.append(refusal("plain comments", "an @ header", f"{shown}:{line}"))
    if root is None or (isinstance(root, ScalarNode) and root.value == ""):
        tree = None
    elif isinstance(root, MappingNode):
        tree = root
        problems.extend(_scan_node(root, shown))
        problems.extend(_scan_references(root, shown))
    else:
        tree = None
        problems.append(refusal("key: value lines", "something else", place(shown, root)))
    if problems:
        raise UserError(problems)
    return tree


def _scan_events(text: str, shown: str) -> None:
    """Refuse what makes a YAML text costly or active, before a tree is built of it."""
    depth = 0
    try:
        for number, event in enumerate(yaml.parse(text, Loader=yaml.SafeLoader)):
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            if fault := _event_fault(event, depth, number):
                raise UserError(refusal(*fault, place(shown, event)))
    except yaml.YAMLError as error:
        raise UserError(_bad_yaml(error, shown)) from error


def _event_fault(event: yaml.Event, depth: int, number: int) -> tuple[str, str] | None:
    if depth > MAX_DEPTH:
        return f"at most {MAX_DEPTH} levels", "one more"
    if number > MAX_EVENTS:
        return f"at most {MAX_EVENTS} entries", "one more"
    if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
        return "every value written out", "an anchor or alias"
    if (tag := getattr(event, "tag", None)) not in _HARMLESS_TAGS:
        return "plain values", f'the tag "{tag}"'
    if isinstance(event, yaml.DocumentStartEvent) and number > 1:
        return "one document", "a second one"
    return None


def _bad_yaml(error: yaml.YAMLError, shown: str) -> Problem:
    mark = getattr(error, "problem_mark", None)
    reason = getattr(error, "problem", None) or "not YAML"
    return Problem(
        id="recipe.bad-yaml",
        message=f"A recipe must be valid YAML, but the parser says: {reason}.",
        where=f"{shown}:{mark.line + 1}" if mark else shown,
        fix="look at the indentation, and put texts with a colon in quotes",
    )


def _scan_node(node: Node, shown: str) -> Iterator[Problem]:
    if isinstance(node, SequenceNode):
        for item in node.value:
            yield from _scan_node(item, shown)
    if not isinstance(node, MappingNode):
        return
    seen: set[str] = set()
    for key, value in node.value:
        name = key.value if isinstance(key, ScalarNode) else None
        if name is None:
            yield refusal("names as keys", "another kind of key", place(shown, key))
        elif name == "hydra":
            yield refusal("no settings of Hydra", 'the key "hydra"', place(shown, key))
        elif _SPECIAL_KEY.fullmatch(name):
            yield refusal("no special keys", f'the key "{name}"', place(shown, key))
        elif name in seen:
            yield refusal("each key once", f'"{name}" again', place(shown, key))
        if name:
            seen.add(name)
        yield from _scan_node(value, shown)


def _iter_scalars(node: Node) -> Iterator[ScalarNode]:
    if isinstance(node, ScalarNode):
        yield node
    elif isinstance(node, SequenceNode):
        for item in node.value:
            yield from _iter_scalars(item)
    elif isinstance(node, MappingNode):
        for key, value in node.value:
            yield from _iter_scalars(key)
            yield from _iter_scalars(value)


def _scan_references(root: Node, shown: str) -> Iterator[Problem]:
    """Allow a few plain references such as ``${lora.r}``; resolvers could read the environment.

    The limit keeps chains of references that double each other cheap.
    """
    total = 0
    for node in _iter_scalars(root):
        found = node.value.count("${")
        total += found
        if found != len(_REFERENCE.findall(node.value)) or "${hydra" in node.value:
            yield refusal("references of the form ${a.b}", f'"{node.value}"', place(shown, node))
        elif found and total > MAX_REFERENCES:
            yield refusal(f"at most {MAX_REFERENCES} references", "one more", place(shown, node))

"""Plain values into frozen dataclasses, strictly: every fault is found, nothing is guessed."""

import dataclasses
import sys
from collections.abc import Iterator, Mapping
from typing import Any, Literal, cast, get_args, get_origin

from lora_cli.config.commands import VARIANTS
from lora_cli.config.schema import (
    default_of,
    default_variant,
    field_hints,
    has_variants,
    key_of,
    mapping_member,
    show,
    union_members,
)
from lora_cli.errors import Problem, nearest_name


class _MismatchError(Exception):
    """A value that does not fit its type; the caller says which key and what was wanted."""


def decode(cls: type, plain: Mapping[str, Any]) -> tuple[Any | None, list[Problem]]:
    """Turn nested dicts into a config.

    Args:
        cls: The dataclass wanted, such as `TrainConfig`.
        plain: Values by key; a key that is left out takes its default.

    Returns:
        The config and no problems, or None and every problem found.
    """
    problems: list[Problem] = []
    config = _section(cls, plain, "", problems)
    return (None if problems else config), problems


def _section(cls: type, plain: Any, prefix: str, problems: list[Problem]) -> Any:
    if not isinstance(plain, Mapping):
        problems.append(_not_a_section(prefix.removesuffix("."), plain))
        return None
    fields = {key_of(field): field for field in dataclasses.fields(cls)}
    problems.extend(_unknown_keys(plain, list(fields), prefix))
    values: dict[str, Any] = {}
    for key, field in fields.items():
        if key not in plain:
            continue
        name, annotation, value = prefix + key, field_hints(cls)[field.name], plain[key]
        if has_variants(name, annotation):
            values[field.name] = _variant(name, value, problems)
        elif dataclasses.is_dataclass(annotation):
            values[field.name] = _section(cast(type, annotation), value, f"{name}.", problems)
        else:
            values[field.name] = _leaf(name, annotation, field, value, problems)
    return None if problems else cls(**values)


def _variant(name: str, plain: Any, problems: list[Problem]) -> Any:
    tag, table = VARIANTS[name]
    if not isinstance(plain, Mapping):
        problems.append(_not_a_section(name, plain))
        return None
    chosen = plain.get(tag, default_variant(name))
    if not isinstance(chosen, str) or chosen not in table:
        wanted = Literal[tuple(table)]  # type: ignore[valid-type]  # built from the table
        fields = dataclasses.fields(table[default_variant(name)])
        field = next(field for field in fields if key_of(field) == tag)
        _leaf(f"{name}.{tag}", wanted, field, chosen, problems)
        return None
    return _section(table[chosen], plain, f"{name}.", problems)


def _not_a_section(name: str, value: Any) -> Problem:
    return Problem(
        id="config.bad-value",
        message=f"`{name}` must be a section of settings, but is {quoted(value)}.",
        key=name,
    )


def unknown_key(name: str, known: list[str]) -> Problem:
    """Describe a key that does not exist; `known` are the full names of its neighbours."""
    # These follow from the choice of an option, and cannot be set.
    tags = {f"{section}.{tag}" for section, (tag, _) in VARIANTS.items()}
    known = [other for other in known if other not in tags]
    near = nearest_name(name, known)
    return Problem(
        id="config.unknown-key",
        message=f"`{name}` must be a setting, but there is none of this name.",
        key=name,
        allowed=", ".join(known) or None,
        fix=f'did you mean "{near}"?' if near else None,
    )


def _unknown_keys(plain: Mapping[Any, Any], known: list[str], prefix: str) -> Iterator[Problem]:
    for key in plain:
        if key not in known:
            yield unknown_key(f"{prefix}{key}", [prefix + name for name in known])


def _leaf(
    name: str,
    annotation: Any,
    field: dataclasses.Field[Any],
    value: Any,
    problems: list[Problem],
) -> Any:
    metadata, mapping = field.metadata, mapping_member(annotation)
    if mapping is not None and isinstance(value, Mapping):
        return _mapping(name, get_args(mapping)[1], metadata, value, problems)
    try:
        return _convert_any(annotation, metadata, value)
    except _MismatchError:
        pass
    problems.append(
        Problem(
            id="config.bad-value",
            message=f"`{name}` must be {wanted(annotation, metadata)}, but is {quoted(value)}.",
            key=name,
            allowed=_choices(annotation) or wanted(annotation, metadata),
            fix=_fix(annotation, value) or _default_text(name, field),
        )
    )
    return None


def _mapping(
    name: str,
    annotation: Any,
    metadata: Mapping[str, Any],
    plain: Mapping[Any, Any],
    problems: list[Problem],
) -> dict[str, Any]:
    """Convert the entries of a mapping in order; a problem names the entry that it is about."""
    values: dict[str, Any] = {}
    for key, value in plain.items():
        if isinstance(key, bool) or not isinstance(key, str | int):
            problems.append(
                Problem(
                    id="config.bad-value",
                    message=f"`{name}` must have names as keys, but has {quoted(key)}.",
                    key=name,
                )
            )
            continue
        try:
            values[str(key)] = _convert_any(annotation, metadata, value)
        except _MismatchError:
            expected = wanted(annotation, metadata)
            problems.append(
                Problem(
                    id="config.bad-value",
                    message=f"`{name}.{key}` must be {expected}, but is {quoted(value)}.",
                    key=f"{name}.{key}",
                    allowed=expected,
                )
            )
    return values


def _is_list(member: Any) -> bool:
    return get_origin(member) is tuple


def _convert_any(annotation: Any, metadata: Mapping[str, Any], value: Any) -> Any:
    # Choices first: a list of names would take a single name as well.
    for member in sorted(union_members(annotation), key=_is_list):
        try:
            return _convert(member, metadata, value)
        except _MismatchError:
            continue
    raise _MismatchError


def _convert(member: Any, metadata: Mapping[str, Any], value: Any) -> Any:
    if get_origin(member) is Literal:
        if isinstance(value, str) and value in get_args(member):
            return value
    elif get_origin(member) is tuple:
        return _convert_tuple(member, metadata, value)
    elif member is bool or member is type(None):
        if isinstance(value, member):
            return value
    elif member is str:
        if isinstance(value, str) and "\0" not in value:
            return value
    elif member in {int, float} and _is_number(member, value) and _within(metadata, value):
        return member(value)
    raise _MismatchError


def _convert_tuple(member: Any, metadata: Mapping[str, Any], value: Any) -> tuple[Any, ...]:
    items = get_args(member)
    if items[-1] is not Ellipsis:
        if not isinstance(value, list | tuple) or len(value) != len(items):
            raise _MismatchError
        return tuple(
            _convert(item, metadata, part) for item, part in zip(items, value, strict=True)
        )
    if not isinstance(value, list | tuple | Mapping):
        return (_convert_any(items[0], metadata, value),)
    if not isinstance(value, list | tuple):
        raise _MismatchError
    if items[0] is str:  # label names 0, 1, 2 are names all the same
        value = [
            str(part) if isinstance(part, int) and not isinstance(part, bool) else part
            for part in value
        ]
    return tuple(_convert_any(items[0], metadata, part) for part in value)


def _is_number(member: type, value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    if member is int:
        return isinstance(value, int)
    # False for nan, inf and for whole numbers that are too large to be turned into a float.
    return abs(value) <= sys.float_info.max


def _within(metadata: Mapping[str, Any], value: float) -> bool:
    return (
        value >= metadata.get("min", value)
        and value <= metadata.get("max", value)
        and ("above" not in metadata or value > metadata["above"])
        and ("below" not in metadata or value < metadata["below"])
    )


def quoted(value: Any) -> str:
    """Show a value in an error: texts in quotes, at most 80 characters."""
    text = f'"{value}"' if isinstance(value, str) else show(value)
    text = text.encode("unicode_escape").decode() if not text.isprintable() else text
    return text if len(text) <= 80 else f"{text[:77]}..."


def _bounds(metadata: Mapping[str, Any]) -> str:
    words = {"min": "of at least", "above": "above", "max": "at most", "below": "below"}
    parts = [f"{words[name]} {metadata[name]}" for name in words if name in metadata]
    return " " + " and ".join(parts) if parts else ""


def wanted(annotation: Any, metadata: Mapping[str, Any]) -> str:
    """Describe what a setting accepts, as the middle of the sentence "`x` must be ..."."""
    return " or ".join(_phrase(member, metadata) for member in union_members(annotation))


def _phrase(member: Any, metadata: Mapping[str, Any]) -> str:
    if member is type(None):
        return "null"
    if get_origin(member) is Literal:
        options = [f'"{option}"' for option in get_args(member)]
        return options[0] if len(options) == 1 else "one of " + ", ".join(options)
    if get_origin(member) is tuple:
        items = get_args(member)
        if items[-1] is Ellipsis:
            return f"a list of {_plural(items[0], metadata)}"
        return f"a list of {len(items)} numbers{_bounds(metadata)}"
    if get_origin(member) is Mapping:
        return f"a mapping from names to {_plural(get_args(member)[1], metadata)}"
    if member is str:
        return "a path" if metadata.get("path") else "text"
    if member is bool:
        return "true or false"
    return ("a whole number" if member is int else "a number") + _bounds(metadata)


def _plural(annotation: Any, metadata: Mapping[str, Any]) -> str:
    if choices := _options(annotation):
        return "names out of " + ", ".join(choices)
    names = {int: "whole numbers", float: "numbers", str: "names"}
    words = [
        "paths" if member is str and metadata.get("path") else names[member]
        for member in union_members(annotation)
    ]
    return " or ".join(words) + _bounds(metadata)


def _options(annotation: Any) -> list[str]:
    members = union_members(annotation)
    items = [get_args(member)[0] if _is_list(member) else member for member in members]
    literals = [item for item in items if get_origin(item) is Literal]
    return [str(option) for item in literals for option in get_args(item)]


def _choices(annotation: Any) -> str | None:
    only_choices = all(
        get_origin(item) is Literal or item is type(None) for item in union_members(annotation)
    )
    return ", ".join(_options(annotation)) if only_choices else None


def _default_text(name: str, field: dataclasses.Field[Any]) -> str:
    if "times" in field.metadata:
        selector, _ = field.metadata["times"]
        return f"leave it out: the default goes by `{selector.partition('.')[0]}`"
    return f"the default is {name}={show(default_of(field))}"


def _fix(annotation: Any, value: Any) -> str | None:
    options = _options(annotation)
    values = value if isinstance(value, list) else [value]
    wrong = next((item for item in values if isinstance(item, str) and item not in options), "")
    if near := nearest_name(wrong, options):
        return f'did you mean "{near}"?'
    if str in union_members(annotation) and isinstance(value, int | float):
        return f'put it in quotes: "{show(value)}"'
    return None

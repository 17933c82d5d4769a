"""What keys there are, read from the dataclasses: names, types, defaults, bounds, help text."""

import ast
import dataclasses
import functools
import inspect
import sys
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union, cast, get_args, get_origin, get_type_hints

from lora_cli.config.commands import COMMANDS, VARIANTS


@dataclass(frozen=True, kw_only=True, slots=True)
class Key:
    """One setting.

    Attributes:
        name: Dotted name as the user writes it, such as ``task.data.path``.
        annotation: Its type, resolved.
        default: Its default.
        metadata: Bounds and flags, as described in `lora_cli.config.sections`.
        help: The string under the field.
        only: What must be chosen for the setting to be read: names of other settings, each with
            the values that will do; without values, any that is not empty will.
    """

    name: str
    annotation: Any
    default: Any
    metadata: Mapping[str, Any]
    help: str
    only: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)

    @property
    def is_path(self) -> bool:
        """Whether the value names a file, folder or source."""
        return bool(self.metadata.get("path"))

    @property
    def is_text(self) -> bool:
        """Whether the value is taken literally on the command line."""
        return self.is_path or bool(self.metadata.get("text"))

    @property
    def is_list(self) -> bool:
        """Whether the value is a list of any length."""
        return any(
            get_origin(member) is tuple and get_args(member)[-1] is Ellipsis
            for member in union_members(self.annotation)
        )

    @property
    def is_mapping(self) -> bool:
        """Whether the value maps names that the user invents to values."""
        return mapping_member(self.annotation) is not None


def key_of(field: dataclasses.Field[Any]) -> str:
    """Return the key of a field: its name without the underscore that guards a Python name."""
    return field.name.removesuffix("_")


def union_members(annotation: Any) -> tuple[Any, ...]:
    """Return the alternatives of a type; a type that is no union is its own only alternative."""
    if get_origin(annotation) in (Union, types.UnionType):
        return get_args(annotation)
    return (annotation,)


def mapping_member(annotation: Any) -> Any:
    """Return the alternative of a type that maps names to values, or None."""
    members = union_members(annotation)
    return next((member for member in members if get_origin(member) is Mapping), None)


def has_variants(name: str, annotation: Any) -> bool:
    """Tell whether a field holds one of several dataclasses, chosen by a config group."""
    if name not in VARIANTS:
        return False
    return set(union_members(annotation)) <= set(VARIANTS[name][1].values())


@functools.cache
def field_hints(cls: type) -> dict[str, Any]:
    """Return the resolved types of a dataclass by field name."""
    return get_type_hints(cls)


@functools.cache
def _module_docs(module: str) -> dict[str, dict[str, str]]:
    source = inspect.getsource(sys.modules[module])
    docs: dict[str, dict[str, str]] = {}
    for node in ast.parse(source).body:
        if not isinstance(node, ast.ClassDef):
            continue
        found: dict[str, str] = {}
        for before, after in zip(node.body, node.body[1:], strict=False):
            if (
                isinstance(before, ast.AnnAssign)
                and isinstance(before.target, ast.Name)
                and isinstance(after, ast.Expr)
                and isinstance(after.value, ast.Constant)
                and isinstance(after.value.value, str)
            ):
                found[before.target.id] = inspect.cleandoc(after.value.value)
        docs[node.name] = found
    return docs


def field_docs(cls: type) -> dict[str, str]:
    """Return the string under each field of a dataclass, from the source of its module.

    Fields of the dataclasses that it is made of are looked up in the source of these.
    """
    docs: dict[str, str] = {}
    for one in reversed(cls.__mro__[:-1]):
        docs |= _module_docs(one.__module__).get(one.__name__, {})
    return docs


def default_of(field: dataclasses.Field[Any]) -> Any:
    """Return the default of a field; every field of a config has one."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def iter_keys(
    cls: type,
    *,
    prefix: str = "",
    variants: Mapping[str, type] | None = None,
    only: Mapping[str, tuple[str, ...]] | None = None,
) -> Iterator[Key]:
    """Yield every setting of a dataclass and of its sections, in the order of the source.

    Args:
        cls: A config dataclass.
        prefix: Dotted name of the section that `cls` fills.
        variants: Dataclass of each section that has several; the default one where left out.
        only: What must be chosen for the whole section to be read; see `Key`.
    """
    for field in dataclasses.fields(cls):
        annotation, default = field_hints(cls)[field.name], default_of(field)
        name = prefix + key_of(field)
        needed = {**(only or {}), **field.metadata.get("only", {})}
        if has_variants(name, annotation):
            section = (variants or {}).get(name, type(default))
            yield from iter_keys(section, prefix=f"{name}.", variants=variants, only=needed)
        elif dataclasses.is_dataclass(annotation):
            section = cast(type, annotation)
            yield from iter_keys(section, prefix=f"{name}.", variants=variants, only=needed)
        else:
            help_text = field_docs(cls).get(field.name, "")
            yield Key(
                name=name,
                annotation=annotation,
                default=default,
                metadata=field.metadata,
                help=help_text,
                only=needed,
            )


def variants_of(command: str) -> dict[str, dict[str, type]]:
    """Return the sections of a command that have variants, each with its table of dataclasses."""
    cls = COMMANDS[command]
    return {
        field.name: VARIANTS[field.name][1]
        for field in dataclasses.fields(cls)
        if has_variants(field.name, field_hints(cls)[field.name])
    }


@functools.cache
def all_keys(command: str) -> dict[str, Key]:
    """Return every setting of a command by name, those of all variants included."""
    keys = {key.name: key for key in iter_keys(COMMANDS[command])}
    for section, table in variants_of(command).items():
        for cls in table.values():
            keys |= {key.name: key for key in iter_keys(cls, prefix=f"{section}.")}
    return keys


def keys_of(command: str, plain: Mapping[str, Any]) -> dict[str, Key]:
    """Return the settings of a decoded configuration by name, those of its own variants only.

    Args:
        command: Subcommand.
        plain: The configuration as nested dicts.
    """
    variants = {
        section: table[plain[section][VARIANTS[section][0]]]
        for section, table in variants_of(command).items()
    }
    return {key.name: key for key in iter_keys(COMMANDS[command], variants=variants)}


@functools.cache
def mapping_settings() -> frozenset[str]:
    """Return the settings, of any command, whose value maps names to values."""
    return frozenset(
        name for command in COMMANDS for name, key in all_keys(command).items() if key.is_mapping
    )


def default_variant(section: str) -> str:
    """Return the name of the first variant of a section."""
    return next(iter(VARIANTS[section][1]))


def to_plain(config: Any) -> Any:
    """Turn a config into dicts, lists and scalars, with the names that the user writes."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {
            key_of(field): to_plain(getattr(config, field.name))
            for field in dataclasses.fields(config)
        }
    if isinstance(config, tuple):
        return [to_plain(item) for item in config]
    if isinstance(config, Mapping):
        return dict(config)
    return config


def base_node(command: str) -> dict[str, Any]:
    """Return the defaults of a command as a plain dict, without the sections that have variants."""
    plain: dict[str, Any] = to_plain(COMMANDS[command]())
    return {name: value for name, value in plain.items() if name not in variants_of(command)}


def flatten(plain: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the leaves of nested dicts by dotted name.

    An empty dict is a leaf, and so is the value of a setting that maps names to values.

    >>> flatten({"lora": {"r": 4}, "seed": 1})
    {'lora.r': 4, 'seed': 1}
    """
    leaves: dict[str, Any] = {}
    for key, value in plain.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value and name not in mapping_settings():
            leaves |= flatten(value, f"{name}.")
        else:
            leaves[name] = value
    return leaves


def nest(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Undo `flatten`.

    >>> nest({"lora.r": 4, "seed": 1})
    {'lora': {'r': 4}, 'seed': 1}
    """
    plain: dict[str, Any] = {}
    for name, value in leaves.items():
        *sections, last = name.split(".")
        node = plain
        for section in sections:
            node = node.setdefault(section, {})
        node[last] = value
    return plain


def select(plain: Mapping[str, Any], name: str) -> Any:
    """Return the value of a dotted name in nested dicts; None where it is absent."""
    node: Any = plain
    for part in name.split("."):
        if not isinstance(node, Mapping) or part not in node:
            return None
        node = node[part]
    return node


def show(value: Any) -> str:
    """Write a value as the user would on the command line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return "[" + ", ".join(show(item) for item in value) + "]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {show(item)}" for key, item in value.items()) + "}"
    return str(value)


def short_type(annotation: Any, metadata: Mapping[str, Any]) -> str:
    """Name a type in a few characters, for the list of keys in `--help`."""
    names = []
    for member in union_members(annotation):
        if member is type(None):
            names.append("null")
        elif get_origin(member) is Literal:
            names.extend(str(option) for option in get_args(member))
        elif get_origin(member) is tuple:
            names.append("[" + short_type(get_args(member)[0], metadata) + ", ...]")
        elif get_origin(member) is Mapping:
            names.append("{name: " + short_type(get_args(member)[1], {}) + ", ...}")
        elif member is str:
            names.append("path" if metadata.get("path") else "text")
        else:
            names.append(member.__name__)
    return "|".join(names)


def package_folder(name: str) -> Path:
    """Return a folder of files that travels with the program, such as ``configs``.

    In an installed wheel it is ``lora_cli/_configs``, in a checkout it stands beside the package.
    """
    package = Path(__file__).resolve().parent.parent
    installed = package / f"_{name}"
    return installed if installed.is_dir() else package.parent / name

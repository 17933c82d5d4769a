"""Names of layers as a person writes them: last parts of paths, and globs."""

from collections.abc import Iterable
from fnmatch import fnmatchcase


def last_parts(names: Iterable[str]) -> tuple[str, ...]:
    """Return the last parts of dotted names, sorted, without repeats."""
    return tuple(sorted({name.rpartition(".")[2] for name in names}))


def is_inside(name: str, modules: Iterable[str]) -> bool:
    """Whether a dotted name is one of `modules` or lies below one."""
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern selects the module path `name`.

    A pattern is the last part or parts of a path ("query", "attention.self.query"), or a glob over
    the full path or over its last part ("*.layer.0.*", "q*"). Upper and lower case differ.
    """
    if name == pattern or name.endswith(f".{pattern}"):
        return True
    return fnmatchcase(name, pattern) or fnmatchcase(name.rpartition(".")[2], pattern)


def outermost(name: str) -> str:
    """Return the path of the adapted layer that an adapter is in: those of one layer may nest.

    >>> outermost("attention.base_layer.out_proj"), outermost("query")
    ('attention', 'query')
    """
    return name.partition(".base_layer")[0]

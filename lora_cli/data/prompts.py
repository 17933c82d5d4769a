"""Prompts with places for the values of a row, which are put in as they are: nothing is run.

A place is the name of a column in braces, ``{title}``. Braces around anything that is no name stay
braces, and what a value holds is never looked at for further places.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from lora_cli.data.types import Row
from lora_cli.errors import Problem

_PLACE = re.compile(r"\{(\w[\w.-]*)\}")
_LISTED = 10


def places_of(prompt: str) -> tuple[str, ...]:
    """Return the names in the places of a prompt, each once, in their order.

    >>> places_of("{title} by {author}: {title}? {} {a b}")
    ('title', 'author')
    """
    return tuple(dict.fromkeys(_PLACE.findall(prompt)))


def fill(prompt: str, values: Mapping[str, Any]) -> str:
    """Put values into the places of a prompt; the items of a list are separated by commas.

    >>> fill("{a} and {b}", {"a": "{b}", "b": ["x", 2]})
    '{b} and x, 2'
    """
    return _PLACE.sub(lambda match: _text(values[match[1]]) or "", prompt)


def check_places(rows: Sequence[Row], columns: Sequence[str]) -> list[Problem]:
    """Return a problem for each column that a prompt names and that some rows have no value in."""
    problems = []
    for column in columns:
        bad = [row for row in rows if _text(row.values.get(column)) is None]
        if not bad:
            continue
        known = list(dict.fromkeys(name for row in bad for name in row.values))
        listed = ", ".join(row.where for row in bad[:_LISTED])
        more = f" and {len(bad) - _LISTED} more" if len(bad) > _LISTED else ""
        count = "1 row" if len(bad) == 1 else f"{len(bad)} rows"
        problems.append(
            Problem(
                id="data.bad-prompt-value",
                message=f"`{column}` must hold a text, a number or a list of such in every row, "
                f"since task.prompt has a place for it, but does not in {count}.",
                key="task.prompt",
                where=listed + more,
                allowed=", ".join(known),
                fix="fill in the values, or change task.prompt",
            )
        )
    return problems


def _text(value: Any) -> str | None:
    if isinstance(value, list):
        items = [_text(item) for item in value]
        known = [item for item in items if item is not None]
        return ", ".join(known) if known and len(known) == len(items) else None
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return f"{value:g}" if isinstance(value, float) else str(value)
    return value if isinstance(value, str) and value.strip() else None

"""Errors as people and programs read them."""

import json
import re
from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from lora_cli.errors import Problem

MAX_SHOWN = 20
_INDENT = " " * 12
# Where a setting was given: command line, a line of a recipe, or a file of ours.
_ORIGIN = re.compile(r"command line.*|.*:\d+|.*\.ya?ml", re.DOTALL)


def printable(text: str) -> str:
    r"""Replace control characters, which a file of a stranger could use to fake output.

    >>> printable("a" + chr(27) + "[2J")
    'a\\x1b[2J'
    """
    return "".join(
        char if char.isprintable() or char == "\n" else char.encode("unicode_escape").decode()
        for char in text
    )


def layout(problem: Problem) -> str:
    """Lay out a problem in at most four parts: rule and value, place, allowed, fix."""
    lines = [f"error[{problem.id}]: {problem.message}"]
    is_setting = problem.key is not None and _ORIGIN.fullmatch(problem.where or "")
    place = "set in:" if is_setting else "where:"
    parts = ((place, problem.where), ("allowed:", problem.allowed), ("fix:", problem.fix))
    for label, text in parts:
        if text:
            lines.append(f"  {label:<10}" + text.replace("\n", f"\n{_INDENT}"))
    return printable("\n".join(lines))


def layout_all(problems: Sequence[Problem]) -> str:
    """Lay out several problems with a blank line between them."""
    shown = [layout(problem) for problem in problems[:MAX_SHOWN]]
    if len(problems) > MAX_SHOWN:
        shown.append(f"... and {len(problems) - MAX_SHOWN} more")
    return "\n\n".join(shown)


def show_problems(problems: Sequence[Problem]) -> None:
    """Write problems to stderr; in colour on a terminal, unless NO_COLOR is set."""
    text = Text(layout_all(problems))
    text.highlight_regex(r"(?m)^error\[[^\]]*\]", "bold red")
    text.highlight_regex(r"(?m)^  (set in|where|allowed|fix):", "bold")
    Console(stderr=True, highlight=False, soft_wrap=True).print(text)


def show_line(text: str) -> None:
    """Write one line to stderr."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(Text(printable(text)))


def as_json(problems: Sequence[Problem], exit_code: int) -> str:
    """Return problems as one JSON object."""
    errors = [
        {
            "id": problem.id,
            "message": problem.message,
            "key": problem.key,
            "set_in": problem.where,
            "allowed": problem.allowed,
            "fix": problem.fix,
        }
        for problem in problems
    ]
    return json.dumps({"error": errors, "exit_code": exit_code}, ensure_ascii=False)

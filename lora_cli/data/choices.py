"""Columns that hold the choices of a row, and which of them is right."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_cli.data.columns import canonical_label
from lora_cli.data.listing import count_rows, list_rows, show_cell, show_value
from lora_cli.data.types import Row
from lora_cli.errors import Problem, UserError

KINDS = ("key", "text", "letter", "index", "number")
# Told apart without a word from the user. A number from 1 is not: 1 may as well be the second.
_AUTOMATIC = ("text", "letter", "index")
_NUMBERED = re.compile(r"(ending|choice|option|sol)_?(\d+)", re.IGNORECASE)
_MEANING = {
    "key": "the key of a choice",
    "text": "the text of a choice",
    "letter": "the letter, from A, of a choice",
    "index": "the number, from 0, of a choice",
    "number": "the number, from 1, of a choice",
}


@dataclass(frozen=True, slots=True)
class Choices:
    """The choices of one row.

    Attributes:
        texts: In order.
        keys: What the data calls each of them; none for most data.
    """

    texts: tuple[str, ...]
    keys: tuple[str, ...] = ()


def numbered_columns(columns: Sequence[str]) -> tuple[str, ...]:
    """Return columns such as ending0, ending1, ... in order; none if there are not two of a kind.

    >>> numbered_columns(["sent1", "ending1", "ending0", "label"])
    ('ending0', 'ending1')
    """
    found: dict[str, dict[int, str]] = {}
    for name in columns:
        if match := _NUMBERED.fullmatch(name):
            found.setdefault(match[1].casefold(), {})[int(match[2])] = name
    for named in found.values():
        if len(named) >= 2 and max(named) - min(named) == len(named) - 1:
            return tuple(named[number] for number in sorted(named))
    return ()


def choices_of(row: Row, columns: Sequence[str]) -> Choices | None:
    """Return the choices of a row, or None if it has not two at least, all of them texts.

    Args:
        row: Any row.
        columns: One column with a list (of texts, or of objects with a text and a label, or an
            object with a list of each), or several columns with one choice each.
    """
    if len(columns) == 1:
        values, keys = _listed(row.values.get(columns[0]))
    else:
        values, keys = [row.values.get(name) for name in columns], ()
    texts = [canonical_label(value) for value in values]
    found = tuple(text for text in texts if text is not None)
    if len(found) < 2 or len(found) < len(texts):
        return None
    return Choices(found, keys if len(keys) == len(found) else ())


def _listed(value: Any) -> tuple[Sequence[Any], tuple[str, ...]]:
    """Return choices and their keys, from any of the layouts of one column."""
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        value = {name: [item.get(name) for item in value] for name in ("text", "label")}
    if isinstance(value, dict):
        texts, labels = value.get("text"), value.get("label")
        keys = [canonical_label(label) for label in labels] if isinstance(labels, list) else []
        named = tuple(key for key in keys if key is not None)
        return texts if isinstance(texts, list) else [], named
    return value if isinstance(value, list) else [], ()


def _position(text: str, names: Sequence[str]) -> int | None:
    return names.index(text) if names.count(text) == 1 else None


def _whole(text: str, choices: Choices, *, first: int) -> int | None:
    if not (text.isascii() and text.isdecimal()):
        return None
    place = int(text) - first
    return place if 0 <= place < len(choices.texts) else None


def _letter(text: str, choices: Choices) -> int | None:
    place = ord(text.upper()) - ord("A") if len(text) == 1 and text.isascii() else -1
    return place if 0 <= place < len(choices.texts) else None


_READERS: Mapping[str, Callable[[str, Choices], int | None]] = {
    "key": lambda text, choices: _position(text, choices.keys),
    "text": lambda text, choices: _position(text, choices.texts),
    "letter": _letter,
    "index": lambda text, choices: _whole(text, choices, first=0),
    "number": lambda text, choices: _whole(text, choices, first=1),
}


def answer_index(value: Any, choices: Choices, kind: str) -> int | None:
    """Return which choice an answer means, counted from 0; None if it means none of them.

    >>> answer_index("B", Choices(("yes", "no")), "letter")
    1
    >>> answer_index(2, Choices(("yes", "no")), "index") is None
    True
    """
    text = canonical_label(value)
    if text is None:
        return None
    exact = _READERS[kind](text, choices)
    return exact if exact is not None else _READERS[kind](text.strip(), choices)


def learn_kind(rows: Sequence[Row], columns: Sequence[str], answer: str) -> str:
    """Return how the answers of all rows are to be read, where only one way makes sense.

    Args:
        rows: Rows whose choices can be read.
        columns: As in `choices_of`.
        answer: Column of the answers.

    Returns:
        One of `KINDS`: ways that fit every row are one if they mean the same in all of them.
        Where none fits, the one that fits most rows; `check_answers` tells which it does not.

    Raises:
        UserError: If several fit and differ.
    """
    pairs = [(row.values.get(answer), found) for row in rows if (found := choices_of(row, columns))]
    kinds = ("key",) if all(choices.keys for _, choices in pairs) else _AUTOMATIC
    read = {
        kind: [answer_index(value, choices, kind) for value, choices in pairs] for kind in kinds
    }
    fitting = [kind for kind in kinds if None not in read[kind]]
    if not fitting:
        return max(kinds, key=lambda kind: sum(place is not None for place in read[kind]))
    if any(read[kind] != read[fitting[0]] for kind in fitting):
        raise UserError(
            Problem(
                id="data.ambiguous-answers",
                message=f"`{answer}` must say in one way which choice is right, but could be "
                + " or ".join(_MEANING[kind] for kind in fitting)
                + ".",
                key="task.answers",
                where=rows[0].where,
                allowed=", ".join(fitting),
                fix=f"task.answers={fitting[0]}",
            )
        )
    return fitting[0]


def check_choices(rows: Sequence[Row], columns: Sequence[str]) -> list[Problem]:
    """Return a problem if some rows have not two choices at least."""
    bad = [(row, _show_choices(row, columns)) for row in rows if choices_of(row, columns) is None]
    if not bad:
        return []
    names = f"`{columns[0]}`" if len(columns) == 1 else f"`{columns[0]}` to `{columns[-1]}`"
    return [
        Problem(
            id="data.bad-choices",
            message=f"{names} must hold two or more choices in every row, but not in "
            f"{count_rows(len(bad))}.",
            where=list_rows(bad),
            allowed="texts that are not empty: in a list, or one in each column",
            fix="correct the rows, or remove them",
        )
    ]


def check_answers(
    rows: Sequence[Row], columns: Sequence[str], answer: str, *, kind: str
) -> list[Problem]:
    """Return a problem if the answers of some rows name none of their choices."""
    bad, could_be_numbers = [], kind == "index"
    for row in rows:
        choices = choices_of(row, columns)
        if choices is None:
            continue
        value = row.values.get(answer)
        could_be_numbers &= answer_index(value, choices, "number") is not None
        if answer_index(value, choices, kind) is None:
            bad.append((row, f"{show_value(value)} of {len(choices.texts)} choices"))
    if not bad:
        return []
    fix = "correct the answers, or remove the rows"
    return [
        Problem(
            id="data.bad-answer",
            message=f"`{answer}` must be {_MEANING[kind]} of its row, but is not in "
            f"{count_rows(len(bad))}.",
            where=list_rows(bad),
            key="task.answers",
            allowed=", ".join(f"{name} ({meaning})" for name, meaning in _MEANING.items()),
            fix="task.answers=number, if 1 is the first choice" if could_be_numbers else fix,
        )
    ]


def _show_choices(row: Row, columns: Sequence[str]) -> str:
    """Return the first of several columns that has no choice, or what the only one holds."""
    if len(columns) == 1:
        return show_cell(row, columns[0], part="choice", fits=canonical_label)
    empty = (name for name in columns if canonical_label(row.values.get(name)) is None)
    name = next(empty, columns[0])
    return f"{name} is {show_cell(row, name)}"

"""Which column is what, and whether its values can be used.

`check_x` returns problems so that a family can report those of all columns and splits at once.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from lora_cli.data.listing import list_rows
from lora_cli.data.types import Row
from lora_cli.errors import Problem, UserError, nearest_name

TEXT_COLUMNS = (
    "text",
    "sentence",
    "content",
    "review",
    "tweet",
    "question",
    "title",
    "document",
    "body",
    "message",
    "comment",
    "utterance",
    "query",
    "headline",
    "description",
)
LABEL_COLUMNS = (
    "label",
    "labels",
    "class",
    "category",
    "sentiment",
    "target",
    "intent",
    "topic",
    "emotion",
    "coarse_label",
    "stars",
    "rating",
)


def list_columns(rows: Sequence[Row]) -> list[str]:
    """Return the names of all columns that any row has, in the order first met."""
    names: dict[str, None] = {}
    for row in rows:
        names.update(dict.fromkeys(row.values))
    return list(names)


def resolve_column(
    columns: Sequence[str], wanted: str | None, *, known: Sequence[str], key: str
) -> tuple[str, str | None]:
    """Return the column to read, and a sentence about it if the user did not name it.

    Args:
        columns: The columns that there are.
        wanted: The name that the user gave, or None.
        known: Usual names, best first; case does not matter.
        key: Configuration key of the column, such as "task.data.text_column".

    Raises:
        UserError: If there is no such column.
    """
    what = key.rpartition(".")[2].removesuffix("_column").replace("_", " ")
    if wanted is None:
        by_folded = {name.casefold(): name for name in reversed(columns)}
        for name in known:
            if name in by_folded:
                found = by_folded[name]
                return found, f"{what}: column {found} (the first usual name that exists)"
        message = f"`{key}` must name the column with the {what}, but no usual name is there."
        fix = f"{key}=NAME with one of these columns"
    elif wanted in columns:
        return wanted, None
    else:
        message = f'`{key}` must name a column of the data, but there is no "{wanted}".'
        nearest = nearest_name(wanted, columns)
        fix = f'did you mean "{nearest}"?' if nearest else f"{key}=NAME with one of these columns"
    raise UserError(
        Problem(
            id="data.missing-column",
            message=message,
            key=key,
            allowed=", ".join(columns),
            fix=fix,
        )
    )


def check_texts(rows: Sequence[Row], column: str) -> list[Problem]:
    """Return a problem if some rows have no text in `column`: null, no string, or only spaces."""
    bad = [(row, found) for row in rows if (found := _text_fault(row, column))]
    fix = "fill in the text, or remove the rows"
    return _row_problem(bad, rule=f"`{column}` must hold a text in every row", fix=fix, name="text")


def _text_fault(row: Row, column: str) -> str | None:
    value = row.values.get(column)
    if isinstance(value, str):
        return None if value.strip() else "empty"
    if value is None:
        return "null" if column in row.values else "missing"
    return _kind(value)


def canonical_label(value: Any) -> str | None:
    """Return a label as text, or None if `value` cannot be one.

    Texts stay as they are; 1 and 1.0 become "1", true becomes "true".
    """
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return str(int(value)) if math.isfinite(value) and value.is_integer() else None
    return value if isinstance(value, str) and value.strip() else None


def check_labels(rows: Sequence[Row], column: str) -> list[Problem]:
    """Return problems of the label column: values that are no labels, and mixed kinds of value."""
    bad = [
        (row, _label_fault(row, column))
        for row in rows
        if canonical_label(row.values.get(column)) is None
    ]
    problems = _row_problem(
        bad,
        rule=f"`{column}` must hold one label in every row: a text or a whole number",
        fix="fill in the label, or remove the rows",
        name="label",
    )
    if bad:
        return problems
    kinds = Counter(_kind(row.values[column]) for row in rows)
    if len(kinds) < 2:
        return problems
    rare = min(kinds, key=lambda kind: kinds[kind])
    odd = [(row, rare) for row in rows if _kind(row.values[column]) == rare]
    common = max(kinds, key=lambda kind: kinds[kind])
    return _row_problem(
        odd,
        rule=f"`{column}` must hold one kind of label, {common} here",
        fix="write all labels as texts, or all as whole numbers",
        name="label-kind",
    )


def number_of(value: Any) -> float | None:
    """Return a finite number, also of a text such as "3.5" (CSV has nothing else), or None."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def check_numbers(rows: Sequence[Row], column: str) -> list[Problem]:
    """Return a problem if some rows have no finite number in `column`."""
    bad = [
        (row, _label_fault(row, column))
        for row in rows
        if number_of(row.values.get(column)) is None
    ]
    fix = "fill in the number, or remove the rows"
    rule = f"`{column}` must hold a finite number in every row"
    return _row_problem(bad, rule=rule, fix=fix, name="number")


def _label_fault(row: Row, column: str) -> str:
    value = row.values.get(column)
    if value is None:
        return "null" if column in row.values else "missing"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, str):
        return f'"{value[:20]}"' if value.strip() else "empty"
    is_number = isinstance(value, int) and not isinstance(value, bool)
    return "too large a number" if is_number else _kind(value)


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, int | float):
        return "a number"
    kinds: dict[type, str] = {str: "a text", list: "a list", dict: "an object"}
    return kinds.get(type(value), f"a value of type {type(value).__name__}")


def _row_problem(
    bad: Sequence[tuple[Row, str]], *, rule: str, fix: str, name: str
) -> list[Problem]:
    """Return one problem for all bad rows: the number of them, and the first ones by name."""
    if not bad:
        return []
    finding = f"is {bad[0][1]} in 1 row" if len(bad) == 1 else f"is not in {len(bad)} rows"
    message = f"{rule}, but {finding}."
    return [Problem(id=f"data.bad-{name}", message=message, where=list_rows(bad), fix=fix)]


def resolve_label_names(
    train_labels: Sequence[str],
    *,
    label_names: Sequence[str] | None,
    class_names: Sequence[str] | None = None,
    column_key: str = "task.data.label_column",
) -> tuple[str, ...]:
    """Return the label names in the order of the model's outputs; never the order first seen.

    Args:
        train_labels: Canonical label of each training row.
        label_names: The names and order that the user gave.
        class_names: The names and order that the data set declares; used if the user gave none.
        column_key: Setting that names the column, for the error.

    Returns:
        The given names, else the declared ones, else the labels of train: by value if all are
        whole numbers, else by their characters.

    Raises:
        UserError: If there are fewer than two labels in train, or fewer than two or repeated
            names were given.
    """
    key = "task.data.label_names"
    found = set(train_labels)
    if len(found) < 2:
        only = f'only "{next(iter(found))}"' if found else "none"
        message = f"`train` must hold at least two different labels, but has {only}."
        fix = f"check {column_key} and task.data.train_split"
        raise UserError(Problem(id="data.one-class", message=message, key=column_key, fix=fix))
    if label_names is not None and len(set(label_names)) < max(2, len(label_names)):
        message = f"`{key}` must be two or more different names, but is {_join(label_names)}."
        raise UserError(
            Problem(
                id="data.bad-label-names",
                message=message,
                key=key,
                allowed=_join(sort_labels(found)),
                fix=f"{key}=[{','.join(sort_labels(found))}]",
            )
        )
    given = label_names if label_names is not None else class_names
    return tuple(given) if given else sort_labels(found)


def sort_labels(labels: set[str]) -> tuple[str, ...]:
    """Sort labels by value if all are whole numbers, else by their characters."""
    numbers = all(_is_whole_number(label) for label in labels)
    return tuple(sorted(labels, key=int)) if numbers else tuple(sorted(labels))


def _is_whole_number(label: str) -> bool:
    return label.removeprefix("-").isdecimal() and label.isascii()


def label_indices(names: Sequence[str], *, numbered: bool) -> dict[str, int]:
    """Return the output index of each canonical label that is accepted.

    Args:
        names: Label names in order.
        numbered: Whether 0, 1, ... stand for the names: true only if somebody stated their
            order. Not used where a name is itself a whole number.
    """
    indices = {name: index for index, name in enumerate(names)}
    if numbered and not any(_is_whole_number(name) for name in names):
        indices |= {str(index): index for index in range(len(names))}
    return indices


def check_known_labels(
    rows: Sequence[Row], column: str, *, indices: Mapping[str, int], stated: bool
) -> list[Problem]:
    """Return a problem if rows have labels that the model has no output for.

    Args:
        rows: Rows whose labels `check_labels` accepted.
        column: The label column.
        indices: What `label_indices` gave.
        stated: Whether the names were stated by the user or the data set, not found in train.
    """
    labels = ((row, canonical_label(row.values.get(column))) for row in rows)
    bad = [(row, label) for row, label in labels if label is not None and label not in indices]
    if not bad:
        return []
    unknown = _join(sort_labels({label for _, label in bad}))
    rule = "be one of `task.data.label_names`" if stated else "be a label that train has"
    quoted = [(row, f'"{label}"') for row, label in bad]
    plural = "row holds" if len(bad) == 1 else "rows hold"
    return [
        Problem(
            id="data.unknown-label",
            message=f"`{column}` must {rule}, but {len(bad)} {plural} another: {unknown}.",
            where=list_rows(quoted),
            allowed=_join(tuple(indices)),
            fix="correct the labels, remove the rows, or name all labels in task.data.label_names",
        )
    ]


def label_notes(
    names: Sequence[str], train_labels: Sequence[str], *, indices: Mapping[str, int]
) -> tuple[str, ...]:
    """Return a sentence about label names that no training row has, if there are some."""
    seen = {indices.get(label) for label in set(train_labels)}
    absent = [name for index, name in enumerate(names) if index not in seen]
    if not absent:
        return ()
    return (f"labels without a row in train, which cannot be learned: {_join(absent)}",)


def _join(names: Sequence[str], *, most: int = 20) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(names[:most]) or "empty") + more

"""Columns that hold what is ranked, and whether it was clicked: one of each, or lists of both."""

from collections.abc import Sequence
from typing import Any

from lora_cli.data.columns import canonical_label
from lora_cli.data.listing import count_rows, list_rows, show_cell
from lora_cli.data.types import Row
from lora_cli.errors import Problem

_CLICKS = {"0": 0, "1": 1, "false": 0, "true": 1}


def candidates_of(value: Any) -> tuple[str, ...] | None:
    """Return a candidate, or a list of them; None where one is no text.

    >>> candidates_of("a"), candidates_of(["a", "b"]), candidates_of([]), candidates_of(["a", ""])
    (('a',), ('a', 'b'), None, None)
    """
    values = value if isinstance(value, list) else [value]
    texts = tuple(text for text in values if isinstance(text, str) and text.strip())
    return texts if texts and len(texts) == len(values) else None


def clicks_of(value: Any) -> tuple[int, ...] | None:
    """Return 1 or 0 for a label, or for each of a list of labels; None where one is another.

    >>> clicks_of(1), clicks_of(["0", True]), clicks_of(0.5), clicks_of([])
    ((1,), (0, 1), None, None)
    """
    values = value if isinstance(value, list) else [value]
    clicks = [_CLICKS.get(canonical_label(item) or "") for item in values]
    found = tuple(click for click in clicks if click is not None)
    return found if found and len(found) == len(clicks) else None


def check_candidates(rows: Sequence[Row], column: str) -> list[Problem]:
    """Return a problem if some rows have nothing to rank in `column`."""
    bad = [
        (row, show_cell(row, column, part="candidate", fits=candidates_of))
        for row in rows
        if candidates_of(row.values.get(column)) is None
    ]
    rule = f"`{column}` must hold a text, or a list of texts, in every row"
    return _problem(bad, rule=rule, name="candidate", allowed="texts that are not empty")


def check_clicks(rows: Sequence[Row], column: str, *, candidates: str) -> list[Problem]:
    """Return problems if some rows have no labels, or not one for each candidate."""
    bad, unequal = [], []
    for row in rows:
        clicks = clicks_of(row.values.get(column))
        texts = candidates_of(row.values.get(candidates))
        if clicks is None:
            bad.append((row, show_cell(row, column, part="label", fits=clicks_of)))
        elif texts is not None and len(texts) != len(clicks):
            unequal.append((row, f"{len(texts)} candidates, {len(clicks)} labels"))
    rule = f"`{column}` must say of every candidate whether it was clicked"
    problems = _problem(bad, rule=rule, name="click", allowed="0 or 1, or a list of these")
    rule = f"`{column}` must have as many labels as `{candidates}` has candidates"
    return problems + _problem(unequal, rule=rule, name="click-count", allowed="one label each")


def check_users(rows: Sequence[Row], column: str | None, *, candidates: str) -> list[Problem]:
    """Return a problem if it is not known of some rows whose they are.

    A row with a list of candidates is a ranking by itself, and needs no user.
    """
    if column is None:
        bad = [
            (row, show_cell(row, candidates))
            for row in rows
            if not isinstance(row.values.get(candidates), list)
        ]
        return _problem(
            bad,
            rule="`task.data.user_column` must name a column, or every row must have a list of "
            "candidates",
            name="user",
            allowed="task.data.user_column=NAME",
        )
    bad = [
        (row, show_cell(row, column))
        for row in rows
        if canonical_label(row.values.get(column)) is None
    ]
    rule = f"`{column}` must name the user of every row"
    return _problem(bad, rule=rule, name="user", allowed="a text or a whole number")


def time_of(value: Any) -> tuple[int, float, str]:
    """Return something that sorts as the time that a number, or a text such as a date, means.

    >>> time_of(9) < time_of("10") < time_of("2024-01-02") < time_of("2024-01-10")
    True
    """
    try:
        return 0, float(value), ""
    except (TypeError, ValueError):
        return 1, 0.0, str(value)


def check_times(rows: Sequence[Row], column: str) -> list[Problem]:
    """Return a problem if some rows have no time, or one of another kind than the first row."""
    kinds = [
        None if row.values.get(column) in (None, "") else time_of(row.values[column])[0]
        for row in rows
    ]
    bad = [
        (row, show_cell(row, column))
        for row, kind in zip(rows, kinds, strict=True)
        if kind is None or kind != kinds[0]
    ]
    rule = f"`{column}` must hold a time in every row"
    allowed = "numbers in all rows, or texts that sort by time, such as 2024-01-31"
    return _problem(bad, rule=rule, name="time", allowed=allowed)


def _problem(
    bad: Sequence[tuple[Row, str]], *, rule: str, name: str, allowed: str
) -> list[Problem]:
    if not bad:
        return []
    count = count_rows(len(bad))
    return [
        Problem(
            id=f"data.bad-{name}",
            message=f"{rule}, but not so in {count}.",
            where=list_rows(bad),
            allowed=allowed,
            fix="correct the rows, or remove them",
        )
    ]

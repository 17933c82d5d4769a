"""Answers that are parts of a context, in the layouts of SQuAD and in columns of their own."""

from collections.abc import Iterator, Sequence
from typing import Any

from lora_cli.data.listing import count_rows, list_rows, show_cell, show_value
from lora_cli.data.types import Row
from lora_cli.errors import Problem

# The text of an answer, and where it begins in its context, counted in characters.
Answer = tuple[str, int]


def answers_of(value: Any, start: Any = None) -> tuple[Answer, ...] | None:
    """Return the answers that a row gives, none of them for a question without one.

    Args:
        value: ``{"text": [...], "answer_start": [...]}``, a list of objects with ``text`` and
            ``answer_start``, or the text of one answer, which may be null or empty.
        start: Where an answer that is a text begins; a number, or digits as in CSV.

    Returns:
        The answers in their order, or None if `value` is nothing of that kind.

    >>> answers_of({"text": ["308"], "answer_start": [34]})
    (('308', 34),)
    >>> answers_of([{"text": "308", "answer_start": 34}]), answers_of("308", "34")
    ((('308', 34),), (('308', 34),))
    >>> answers_of({"text": [], "answer_start": []}), answers_of(""), answers_of("308")
    ((), (), None)
    """
    if isinstance(value, dict):
        texts, starts = value.get("text"), value.get("answer_start")
    elif isinstance(value, list):
        if not all(isinstance(item, dict) for item in value):
            return None
        texts, starts = ([item.get(name) for item in value] for name in ("text", "answer_start"))
    elif value is None or value == "":
        return ()
    else:
        texts, starts = value, start
    texts, starts = (item if isinstance(item, list) else [item] for item in (texts, starts))
    places = [_place(item) for item in starts]
    if len(texts) != len(places) or not all(isinstance(text, str) and text for text in texts):
        return None
    found = [(text, place) for text, place in zip(texts, places, strict=True) if place is not None]
    return tuple(found) if len(found) == len(texts) else None


def _place(value: Any) -> int | None:
    if isinstance(value, bool):
        return None
    if isinstance(value, str) and value.strip().isdecimal():
        return int(value)
    # A column of integers with gaps is one of floats in many tools.
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, int) else None


def row_answers(row: Row, column: str, start: str | None) -> tuple[Answer, ...] | None:
    """Return the answers of a row as `answers_of` does, None also where the column is missing."""
    if column not in row.values:
        return None
    return answers_of(row.values[column], row.values.get(start) if start else None)


def check_answers(
    rows: Sequence[Row], *, context: str, answers: str, start: str | None
) -> list[Problem]:
    """Return problems if rows have no readable answers, or answers that their context does not.

    Args:
        rows: Rows with a text in `context`.
        context: Column of the context.
        answers: Column of the answers.
        start: Column of where an answer begins, where that is not in `answers`.
    """
    unread, elsewhere = [], []
    for row in rows:
        found = row_answers(row, answers, start)
        if found is None:
            unread.append((row, show_cell(row, answers)))
            continue
        text = row.values.get(context)
        wrong = (_fault(text, answer) for answer in found if isinstance(text, str))
        elsewhere += [(row, fault) for fault in wrong if fault is not None]
    problems = []
    if unread:
        problems.append(
            Problem(
                id="data.bad-answers",
                message=f"`{answers}` must hold the answers of every row, but does not in "
                f"{count_rows(len(unread))}.",
                where=list_rows(unread),
                allowed='{"text": ["308"], "answer_start": [34]}, with empty lists for a question '
                "without an answer; a list of such objects; or a text, with its place in "
                f"{start or 'a column answer_start'}",
                fix="correct the rows, or remove them",
            )
        )
    if elsewhere:
        count = len({row.where for row, _ in elsewhere})
        problems.append(
            Problem(
                id="data.answer-elsewhere",
                message=f"`{answers}` must hold texts that stand in `{context}` where they say, "
                f"but does not in {count_rows(count)}.",
                where=list_rows(elsewhere),
                allowed="places counted in characters from 0, white space included",
                fix="correct the places, or remove the rows",
            )
        )
    return problems


def _fault(context: str, answer: Answer) -> str | None:
    """Say what is wrong with the place of an answer, and where else its text is."""
    text, place = answer
    if not text.strip():
        return "an answer of white space"
    if place >= 0 and context.startswith(text, place):
        return None
    # Of several, the one that was probably meant.
    places = [n for n in range(len(context)) if context.startswith(text, n)]
    nearest = min(places, key=lambda n: abs(n - place), default=None)
    where = "nowhere" if nearest is None else f"at {nearest}"
    return f"{show_value(text)} is not at {place} but {where}"


def squad_rows(document: Any) -> list[dict[str, Any]] | None:
    """Return one row for each question of a document in the layout of SQuAD's own files.

    That is ``{"data": [{"title", "paragraphs": [{"context", "qas": [{"question", ...}]}]}]}``. A
    row has the title, if there is one, the context, and all that stands beside the question.

    Returns:
        The rows in order, or None if the document is not of that layout.
    """
    try:
        return list(_iter_squad(document["data"]))
    except (TypeError, KeyError, ValueError, AttributeError):
        return None


def _iter_squad(articles: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for article in articles:
        title = {"title": article["title"]} if "title" in article else {}
        for paragraph in article["paragraphs"]:
            for question in paragraph["qas"]:
                yield {**title, "context": paragraph["context"], **question}

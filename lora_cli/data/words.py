"""Columns that hold the words of a text, and one tag for each of them."""

import re
import unicodedata
from collections.abc import Sequence
from typing import Any

from lora_cli.data.columns import canonical_label
from lora_cli.data.listing import count_rows, list_rows, show_cell
from lora_cli.data.types import Row
from lora_cli.errors import Problem

# Scripts without spaces between words: Han with its extensions, kana.
_UNSPACED = "぀-ヿ㐀-䶿一-鿿豈-﫿\U00020000-\U0003134f"
_WORD = re.compile(rf"[{_UNSPACED}]|(?:(?![{_UNSPACED}])\w)+|[^\w\s]")
_ALL_UNSPACED = re.compile(rf"[{_UNSPACED}]+")

Span = tuple[int, int]


def words_of(value: Any) -> tuple[str, ...] | None:
    """Return the words of a list, or of a text with spaces between them; None if it is neither.

    >>> words_of(["New", "York"]), words_of("New  York"), words_of([])
    (('New', 'York'), ('New', 'York'), None)
    """
    words = value.split() if isinstance(value, str) else value
    if not isinstance(words, list) or not words:
        return None
    return tuple(words) if all(_is_word(word) for word in words) else None


def _is_word(value: Any) -> bool:
    return isinstance(value, str) and value.strip() != ""


def tags_of(value: Any) -> tuple[str, ...] | None:
    """Return the tags of a list, or of a text with spaces between them; None if it is neither.

    >>> tags_of(["O", "B-LOC"]), tags_of([0, 3]), tags_of("O B-LOC")
    (('O', 'B-LOC'), ('0', '3'), ('O', 'B-LOC'))
    """
    values = value.split() if isinstance(value, str) else value
    if not isinstance(values, list):
        return None
    tags = [canonical_label(item) for item in values]
    found = tuple(tag for tag in tags if tag is not None)
    return found if len(found) == len(tags) else None


def split_words(text: str) -> tuple[tuple[str, ...], tuple[Span, ...]]:
    """Return the words of a text and where they are in it, counted in characters.

    Punctuation marks are words of their own, and so is each character of Chinese and Japanese. What
    stands on or beside a letter, such as an accent or a vowel of Hindi, is part of its word.

    >>> split_words("Ask 李明, now.")[0], split_words("हिन्दी!")[0]
    (('Ask', '李', '明', ',', 'now', '.'), ('हिन्दी', '!'))
    """
    spans: list[Span] = []
    for match in _WORD.finditer(text):
        start, end = match.span()
        is_beside = bool(spans) and spans[-1][1] == start
        if is_beside and _goes_on(text[slice(*spans[-1])], match.group()):
            start = spans.pop()[0]
        spans.append((start, end))
    return tuple(text[slice(*span)] for span in spans), tuple(spans)


def _goes_on(before: str, part: str) -> bool:
    """Whether a part that stands beside a word belongs to it: a combining mark, or behind one."""
    if _ALL_UNSPACED.fullmatch(part):
        return False
    is_behind = unicodedata.category(before[-1]).startswith("M") and before[0].isalnum()
    return unicodedata.category(part[0]).startswith("M") or (is_behind and part[0].isalnum())


def join_words(words: Sequence[str]) -> tuple[str, tuple[Span, ...]]:
    """Return words as one text, and where they are in it, counted in characters.

    There is a space between two words, but for two of a script that has none.

    >>> join_words(["New", "York"]), join_words(["北", "京", "OK"])
    (('New York', ((0, 3), (4, 8))), ('北京 OK', ((0, 1), (1, 2), (3, 5))))
    """
    text, spans, was_unspaced = "", [], True
    for word in words:
        is_unspaced = _ALL_UNSPACED.fullmatch(word) is not None
        if text and not (is_unspaced and was_unspaced):
            text += " "
        spans.append((len(text), len(text) + len(word)))
        text, was_unspaced = text + word, is_unspaced
    return text, tuple(spans)


def check_words(rows: Sequence[Row], column: str) -> list[Problem]:
    """Return a problem if some rows have no list of words in `column`."""
    bad = [
        (row, show_cell(row, column, part="word", fits=_is_word))
        for row in rows
        if words_of(row.values.get(column)) is None
    ]
    rule = f"`{column}` must list the words of every row"
    allowed = "a list of texts that are not empty, or a text with spaces between the words"
    return _problem(bad, rule=rule, name="words", allowed=allowed)


def check_tags(rows: Sequence[Row], words: str, tags: str) -> list[Problem]:
    """Return problems if some rows have no tags, or not one for each word.

    Args:
        rows: Rows whose words `check_words` accepted.
        words: Column of the words.
        tags: Column of the tags.
    """
    bad = [
        (row, show_cell(row, tags, part="tag", fits=canonical_label))
        for row in rows
        if tags_of(row.values.get(tags)) is None
    ]
    rule = f"`{tags}` must list the tags of every row"
    allowed = "a list of texts or whole numbers, or a text with spaces between the tags"
    problems = _problem(bad, rule=rule, name="tags", allowed=allowed)
    unequal = []
    for row in rows:
        first, second = words_of(row.values.get(words)), tags_of(row.values.get(tags))
        if first is not None and second is not None and len(first) != len(second):
            unequal.append((row, f"{len(first)} words, {len(second)} tags"))
    if unequal:
        problems.append(
            Problem(
                id="data.tag-count",
                message=f"`{tags}` must have one tag for each word of `{words}`, but has not in "
                f"{count_rows(len(unequal))}.",
                where=list_rows(unequal),
                fix="correct the rows, or remove them",
            )
        )
    return problems


def _problem(
    bad: Sequence[tuple[Row, str]], *, rule: str, name: str, allowed: str
) -> list[Problem]:
    if not bad:
        return []
    return [
        Problem(
            id=f"data.bad-{name}",
            message=f"{rule}, but does not in {count_rows(len(bad))}.",
            where=list_rows(bad),
            allowed=allowed,
            fix="correct the rows, or remove them",
        )
    ]

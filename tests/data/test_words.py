import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_cli.data.types import Row
from lora_cli.data.words import (
    check_tags,
    check_words,
    join_words,
    split_words,
    tags_of,
    words_of,
)


def row(number: int, **values: Any) -> Row:
    return Row(str(number), values, "rows.jsonl", number)


@given(st.text(max_size=40))
def test_words_are_where_they_are_said_to_be(text: str) -> None:
    words, spans = split_words(text)
    assert [text[start:end] for start, end in spans] == list(words)
    assert "".join(words) == re.sub(r"\s", "", text)


@given(st.lists(st.text("ab,北京", min_size=1, max_size=3), max_size=8))
def test_joined_words_are_where_they_are_said_to_be(words: list[str]) -> None:
    text, spans = join_words(words)
    assert [text[start:end] for start, end in spans] == words
    assert text.replace(" ", "") == "".join(words)


def test_chinese_words_are_joined_without_spaces_and_split_by_character() -> None:
    assert join_words(["北京", "大学"])[0] == "北京大学"
    assert join_words(["in", "北京", "now"])[0] == "in 北京 now"
    assert split_words("他在 Berlin。")[0] == ("他", "在", "Berlin", "。")
    assert split_words("𠮷田さん")[0] == ("𠮷", "田", "さ", "ん")


def test_combining_marks_belong_to_their_word() -> None:
    # An accent of its own, vowels and joined letters of Hindi, vowels of Arabic, a heart in red.
    for word in ("Cafe\u0301", "हिन्दी", "मुंबई", "عَرَبِيّ", "\u2764\ufe0f"):
        words, spans = split_words(f"{word}, {word}北 a")
        assert words == (word, ",", word, "北", "a")
        assert spans[2] == (len(word) + 2, 2 * len(word) + 2)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, "null"),
        ([], "empty"),
        ("", "empty"),
        ("  ", "empty"),
        (["a", ""], "word 2 is empty"),
        (["a", 1], "word 2 is 1"),
        (3, "3"),
        ({"a": 1}, '{"a": 1}'),
    ],
)
def test_what_lists_no_words(value: Any, said: str) -> None:
    assert words_of(value) is None
    (problem,) = check_words([row(1, tokens=["a"]), row(2, tokens=value)], "tokens")
    assert problem.id == "data.bad-words"
    assert problem.where == f"rows.jsonl row 2 ({said})"


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, "null"),
        (3, "3"),
        ([None], "tag 1 is null"),
        (["O", ["O"]], 'tag 2 is ["O"]'),
        ([0.5], "tag 1 is 0.5"),
    ],
)
def test_what_lists_no_tags(value: Any, said: str) -> None:
    assert tags_of(value) is None
    (problem,) = check_tags([row(7, tokens=["a"], tags=value)], "tokens", "tags")
    assert problem.id == "data.bad-tags"
    assert problem.where == f"rows.jsonl row 7 ({said})"


def test_a_tag_for_each_word() -> None:
    rows = [row(1, tokens=["a", "b"], tags=["O"]), row(2, tokens="a b", tags="O O")]
    (problem,) = check_tags(rows, "tokens", "tags")
    assert problem.id == "data.tag-count"
    assert problem.where == "rows.jsonl row 1 (2 words, 1 tags)"


def test_ten_rows_are_named_and_the_others_counted() -> None:
    (problem,) = check_words([row(number, tokens=[]) for number in range(1, 14)], "tokens")
    assert "13 rows" in problem.message
    assert (problem.where or "").endswith("rows.jsonl row 10 (empty) and 3 more")

from typing import Any

import pytest

from lora_cli.data.passages import check_passages, passage_of
from lora_cli.data.types import Row


def test_a_list_of_texts_is_one_text() -> None:
    assert passage_of("one") == "one"
    assert passage_of(["甲 你好", "乙 好"]) == "甲 你好 乙 好"
    assert passage_of(["a", "b"], between="; ") == "a; b"
    assert passage_of([]) == ""


@pytest.mark.parametrize(
    ("value", "said"),
    [(None, "null"), (3, "3"), (["a", 3], "part 2 is 3"), ({"a": "b"}, '{"a": "b"}')],
)
def test_what_is_no_text(value: Any, said: str) -> None:
    row = Row("1", {"c": value}, "f.jsonl", 4)
    for may_be_empty in (False, True):
        (problem,) = check_passages([row], "c", may_be_empty=may_be_empty)
        assert (problem.id, problem.where) == ("data.bad-passage", f"f.jsonl row 4 ({said})")


@pytest.mark.parametrize("value", ["", " ", [], [" "]])
def test_an_empty_text_is_allowed_on_demand(value: Any) -> None:
    row = Row("1", {"c": value}, "f.jsonl", 4)
    assert check_passages([row], "c", may_be_empty=True) == []
    assert len(check_passages([row], "c")) == 1

from typing import Any

import pytest

from lora_cli.data.label_lists import check_label_lists, labels_of
from lora_cli.data.types import Row


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (["joy", "awe"], ("joy", "awe")),
        ([2, 0], ("2", "0")),
        ([], ()),
        ("joy, awe", ("joy", "awe")),
        ("joy", ("joy",)),
        ("", ()),
        (3, ("3",)),
        (None, None),
        (True, None),
        ("joy,,awe", None),
        (["joy", None], None),
        ({"joy": 1}, None),
        (0.5, None),
    ],
)
def test_what_lists_labels(value: Any, expected: tuple[str, ...] | None) -> None:
    assert labels_of(value) == expected


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, "null"),
        (["joy", "joy"], '["joy", "joy"]'),
        ("joy, joy", '"joy, joy"'),
        ([0.5], "label 1 is 0.5"),
    ],
)
def test_bad_rows_are_named(value: Any, said: str) -> None:
    rows = [Row("1", {"y": ["joy"]}, "d.jsonl", 1), Row("2", {"y": value}, "d.jsonl", 2)]
    (problem,) = check_label_lists(rows, "y")
    assert problem.id == "data.bad-labels"
    assert problem.where == f"d.jsonl row 2 ({said})"


def test_good_rows_have_no_problem() -> None:
    rows = [Row("1", {"y": []}, "d.jsonl", 1), Row("2", {"y": "joy, awe"}, "d.jsonl", 2)]
    assert check_label_lists(rows, "y") == []

from typing import Any

import pytest

from lora_cli.commands.arranging import leave_out
from lora_cli.errors import UserError


class Notes:
    """A display that keeps what it is told."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def note(self, text: str) -> None:
        self.texts.append(text)


def test_rows_that_are_not_to_be_used_are_left_out_and_counted() -> None:
    display: Any = Notes()
    rows = [{"id": str(n), **({"left_out": True} if n % 3 == 0 else {})} for n in range(10)]
    kept = leave_out(rows, "train", display)
    assert [row["id"] for row in kept] == ["1", "2", "4", "5", "7", "8"]
    assert display.texts == ["train: left out 4 of 10 rows, longer than task.max_length"]


def test_rows_stay_as_they_are_where_all_are_used() -> None:
    display: Any = Notes()
    rows = [{"id": "1"}, {"id": "2", "left_out": False}]
    assert leave_out(rows, "train", display) is rows
    assert not display.texts


def test_a_split_must_keep_a_row() -> None:
    with pytest.raises(UserError) as caught:
        leave_out([{"id": "1", "left_out": True}], "validation", Notes())  # type: ignore[arg-type]
    (problem,) = caught.value.problems
    assert problem.id == "task.all-overlong"
    assert "validation" in problem.message

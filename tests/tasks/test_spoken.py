"""Rows that are too long to be trained on."""

import pytest

from lora_cli.errors import UserError
from lora_cli.tasks.spoken import without_long


def test_what_is_left_out_is_told() -> None:
    rows = [{"id": "a"}, {"id": "b"}, {"id": "c"}]
    assert without_long(rows, list(rows), limit="30 s", key="k", fix="f") == (rows, ())
    kept, notes = without_long(rows, rows[:1], limit="30 s", key="k", fix="f")
    assert kept == rows[:1]
    assert notes == ("left out 2 of 3 rows, longer than 30 s",)
    with pytest.raises(UserError, match="all are longer than 30 s") as caught:
        without_long(rows, [], limit="30 s", key="task.max_seconds", fix="f")
    assert caught.value.problems[0].key == "task.max_seconds"

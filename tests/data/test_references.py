from typing import Any

import pytest

from lora_cli.data.references import check_references, row_references
from lora_cli.data.types import Row


def row(value: Any, number: int = 1) -> Row:
    return Row(str(number), {"target": value}, "rows.jsonl", number)


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        ("a text", ("a text",)),
        (["a", "b"], ("a", "b")),
        ("", None),
        (" \n", None),
        ([], None),
        (["a", ""], None),
        (["a", None], None),
        (None, None),
        (3, None),
        ({"text": "a"}, None),
    ],
)
def test_texts_that_are_wanted(value: Any, wanted: tuple[str, ...] | None) -> None:
    assert row_references(row(value), "target") == wanted
    assert bool(check_references([row(value)], "target")) == (wanted is None)
    assert row_references(row(value), "other") is None


def test_all_bad_rows_are_named_at_once() -> None:
    assert check_references([row("a")], "target") == []
    (problem,) = check_references([row(3, n) for n in range(1, 14)] + [row("x", 14)], "target")
    assert problem.id == "data.bad-reference"
    assert problem.message == (
        "`target` must hold a text in every row, or a list of texts, but has none in 13 rows."
    )
    assert (problem.where or "").startswith("rows.jsonl row 1 (a value of type int), ")
    assert (problem.where or "").endswith(" and 3 more")
    found = {
        problem.where
        for value in (None, "", ["a", 1])
        for problem in check_references([row(value)], "target")
    }
    assert found == {
        "rows.jsonl row 1 (null)",
        "rows.jsonl row 1 (empty)",
        "rows.jsonl row 1 (a list with something else than texts)",
    }
    (missing,) = check_references([row("x")], "other")
    assert missing.where == "rows.jsonl row 1 (missing)"

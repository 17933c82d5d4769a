from typing import Any

import pytest

from lora_cli.data.candidates import (
    candidates_of,
    check_candidates,
    check_clicks,
    check_times,
    check_users,
    clicks_of,
    time_of,
)
from lora_cli.data.types import Row


def rows_of(*values: dict[str, Any]) -> list[Row]:
    return [Row(str(n), row, "f.jsonl", n) for n, row in enumerate(values, start=1)]


def places(problems: list[Any]) -> list[tuple[str, str]]:
    return [(problem.id, problem.where) for problem in problems]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, "null"),
        ("", "empty"),
        (" ", "empty"),
        ([], "empty"),
        (["a", None], "candidate 2 is null"),
        (["a", " "], "candidate 2 is empty"),
        (3, "3"),
        ({"a": 1}, '{"a": 1}'),
    ],
)
def test_what_is_no_candidate(value: Any, said: str) -> None:
    rows = rows_of({"c": "a"}, {"c": ["a", "b"]}, {"c": value})
    assert candidates_of(value) is None
    found = places(check_candidates(rows, "c"))
    assert found == [("data.bad-candidate", f"f.jsonl row 3 ({said})")]


@pytest.mark.parametrize(
    ("value", "clicks"),
    [(1, (1,)), ("0", (0,)), (1.0, (1,)), (False, (0,)), ([1, 0, "1"], (1, 0, 1)), ("true", (1,))],
)
def test_clicks_are_read(value: Any, clicks: Any) -> None:
    assert clicks_of(value) == clicks


def test_clicks_of_other_values_or_number_are_refused() -> None:
    rows = rows_of(
        {"c": "a", "y": 2},
        {"c": ["a", "b"], "y": [1]},
        {"c": "a", "y": 1},
        {"c": "a"},
        {"c": ["a"], "y": 0},
    )
    assert places(check_clicks(rows, "y", candidates="c")) == [
        ("data.bad-click", "f.jsonl row 1 (2), f.jsonl row 4 (missing)"),
        ("data.bad-click-count", "f.jsonl row 2 (2 candidates, 1 labels)"),
    ]


def test_a_row_needs_a_user_unless_it_is_a_list() -> None:
    rows = rows_of({"c": "a", "u": 7}, {"c": ["a"], "u": "x"}, {"c": "a", "u": None})
    assert places(check_users(rows, "u", candidates="c")) == [
        ("data.bad-user", "f.jsonl row 3 (null)")
    ]
    assert places(check_users(rows, None, candidates="c")) == [
        ("data.bad-user", 'f.jsonl row 1 ("a"), f.jsonl row 3 ("a")')
    ]
    assert check_users(rows[1:2], None, candidates="c") == []


def test_times_sort_as_numbers_or_as_texts() -> None:
    assert sorted(["10", "9", "1e1"], key=time_of)[0] == "9"
    assert sorted(["2024-02-01", "2023-12-31"], key=time_of)[0] == "2023-12-31"
    rows = rows_of({"t": 1}, {"t": "soon"}, {"t": None}, {"t": "2"})
    assert places(check_times(rows, "t")) == [
        ("data.bad-time", 'f.jsonl row 2 ("soon"), f.jsonl row 3 (null)')
    ]

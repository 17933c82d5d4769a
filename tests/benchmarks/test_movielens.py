"""Rows of ratings that were made up, in a wheel as the package has it."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture(scope="module")
def movielens(script: Callable[[str], ModuleType]) -> Any:
    return script("movielens")


def test_a_history_holds_what_was_liked_before_and_the_latest_rows_test(
    movielens: Any, wheel: Callable[..., Path]
) -> None:
    one = [(7, 1 + n % 3, 5 - n % 2, 100 - n) for n in range(10)]
    # Nothing of the latest fifth of this user was liked, nor of the tenth before it.
    other = [(8, 1, 5, n) for n in range(7)] + [(8, n, 1, 7 + n) for n in (1, 2, 3)]
    splits = movielens.convert(wheel([*one, *other]), history=2, plain=True)
    assert [row["user"] for row in splits["test"]] == ["7", "7"]
    assert [row["user"] for row in splits["validation"]] == ["7"]
    assert [row["user"] for row in splits["train"]] == ["7"] * 7 + ["8"] * 10
    rows = [row for split in splits.values() for row in split if row["user"] == "7"]
    assert [row["time"] for row in rows] == list(range(91, 101))
    assert rows[0]["history"] == []
    for place, row in enumerate(rows):
        liked = [r["candidate"] for r in rows[:place] if r["clicked"]]
        assert row["history"] == liked[-2:]
    assert rows[0]["candidate"] == 'One "Quoted" (1990), Drama'


def test_what_others_thought_is_counted_before_that_second_alone(
    movielens: Any, wheel: Callable[..., Path]
) -> None:
    ratings = [(1, 1, 5, 10), (2, 1, 2, 20), (3, 1, 4, 20), (4, 1, 1, 30), (5, 1, 5, 40)]
    splits = movielens.convert(wheel(ratings), history=2)
    rows = {row["user"]: row for row in splits["train"]}
    counted = {user: (row["seen"], row["likes"]) for user, row in rows.items()}
    assert counted == {"1": (0, 0), "2": (1, 1), "3": (1, 1), "4": (3, 2), "5": (4, 2)}
    assert rows["1"]["candidate"] == 'One "Quoted" (1990), Drama. New'
    assert rows["4"]["candidate"].endswith("Drama. Liked by 7 of 10, seen by 3")
    assert rows["4"]["clicked"] == 0

import random
from collections import defaultdict
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_cli.config.tasks import DataConfig
from lora_cli.data.groups import Groups
from lora_cli.data.splits import choose_splits, limit_rows
from lora_cli.data.types import Row
from lora_cli.errors import UserError


def rows_of(*users: tuple[str, str]) -> tuple[Row, ...]:
    """Rows of each user with these labels, in turns: the rows of a user are not side by side."""
    rows: list[tuple[int, str, str]] = []
    for name, labels in users:
        rows += [(place, name, label) for place, label in enumerate(labels)]
    rows.sort()
    return tuple(
        Row(str(n), {"user": name, "label": label, "time": place}, "f", n)
        for n, (place, name, label) in enumerate(rows, start=1)
    )


def has_one(rows: Any) -> bool:
    return any(row.values["label"] == "1" for row in rows)


def user_of(row: Row) -> str:
    return str(row.values["user"])


WHOLE = Groups(group_of=user_of, is_usable=has_one)
LATEST = Groups(group_of=user_of, is_usable=has_one, time_of=lambda row: row.values["time"])
USERS = tuple((f"u{n}", "10" * 5) for n in range(20))


def by_user(rows: Any) -> dict[str, list[Row]]:
    found = defaultdict(list)
    for row in rows:
        found[user_of(row)].append(row)
    return found


@given(st.lists(st.text("01", min_size=1, max_size=6), min_size=2, max_size=15), st.integers(0, 9))
def test_whole_groups_are_cut_that_can_be_evaluated(labels: list[str], seed: int) -> None:
    rows = rows_of(*((f"u{n}", text) for n, text in enumerate(labels)))
    usable = [text for text in labels if "1" in text]
    if not usable:
        return
    try:
        stay, cut = WHOLE.cut(rows, max(1, len(rows) // 5), split="validation", seed=seed)
    except UserError:
        # One user who can be evaluated, with nobody else to stay.
        assert len(labels) == 1
        return
    assert not set(by_user(stay)) & set(by_user(cut))
    assert all(has_one(own) for own in by_user(cut).values())
    assert sorted(stay + cut, key=lambda row: row.number) == list(rows)
    assert [row.number for row in cut] == sorted(row.number for row in cut)
    assert stay


def test_a_cut_has_its_size_and_depends_on_the_seed_alone() -> None:
    rows = rows_of(*USERS)
    cuts = [WHOLE.cut(rows, 40, split="test", seed=seed)[1] for seed in (1, 1, 2)]
    assert len(cuts[0]) == 40
    assert cuts[0] == cuts[1] != cuts[2]


def test_the_latest_rows_of_each_group_are_cut() -> None:
    rows = list(rows_of(*USERS, ("one", "1"), ("late", "1111110000")))
    random.Random(1).shuffle(rows)
    stay, cut = LATEST.cut(tuple(rows), round(0.3 * len(rows)), split="validation", seed=1)
    parts = by_user(stay), by_user(cut)
    # A single row stays, and so do latest rows in which nothing was clicked.
    assert {"one", "late"} <= set(parts[0]) - set(parts[1])
    for name, own in parts[1].items():
        assert len(own) == 3
        assert min(r.values["time"] for r in own) > max(r.values["time"] for r in parts[0][name])


def test_what_cannot_be_cut_is_refused() -> None:
    for groups in (WHOLE, LATEST):
        with pytest.raises(UserError) as caught:
            groups.cut(rows_of(("a", "00"), ("b", "0")), 1, split="validation", seed=1)
        assert caught.value.problems[0].id == "data.too-few-groups"
    with pytest.raises(UserError):
        WHOLE.cut(rows_of(("a", "1111")), 1, split="validation", seed=1)


def test_groups_are_drawn_whole() -> None:
    rows = rows_of(*USERS)
    drawn = WHOLE.draw(rows, 37, split="test", seed=3)
    assert len(drawn) == 30
    assert all(len(own) == 10 for own in by_user(drawn).values())
    assert WHOLE.draw(rows, 37, split="test", seed=4) != drawn
    with pytest.raises(UserError) as caught:
        WHOLE.draw(rows, 9, split="test", seed=3)
    assert caught.value.problems[0].fix == "task.data.max_eval_rows=10 or more"


def test_groups_that_cannot_be_evaluated_are_named_by_their_first_row() -> None:
    found = WHOLE.unusable(rows_of(("a", "00"), ("b", "01"), ("c", "000")))
    assert [(user_of(row), row.number) for row in found] == [("a", 1), ("c", 3)]


def test_splits_are_cut_and_limited_by_groups() -> None:
    rows = {"train": rows_of(*USERS)}
    splits, notes = choose_splits(
        rows, DataConfig(test_split=0.2), seed=42, label_of=lambda _: None, groups=WHOLE
    )
    assert {name: len(found) for name, found in splits.items()} == {
        "train": 140,
        "validation": 20,
        "test": 40,
    }
    assert notes[0] == "validation: 20 rows cut from train (10 %, whole users, seed 42)"
    config = DataConfig(max_train_rows=55, max_eval_rows=15)
    limited, notes = limit_rows(splits, config, seed=42, groups=WHOLE)
    assert [len(found) for found in limited.values()] == [55, 10, 10]
    assert notes[1] == "validation: 10 of 20 rows drawn (seed 42)"
    limited, _ = limit_rows(splits, config, seed=42, is_training=False, groups=WHOLE)
    assert all(len(own) == 10 for own in by_user(limited["train"]).values())

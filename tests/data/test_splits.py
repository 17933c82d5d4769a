import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_cli.config.tasks import DataConfig
from lora_cli.data.splits import choose_splits, limit_rows
from lora_cli.data.types import Row
from lora_cli.errors import UserError


def rows_of(labels, source="f"):
    return tuple(
        Row(str(n), {"text": f"{source} {n}", "label": label}, source, n)
        for n, label in enumerate(labels, start=1)
    )


def label_of(row):
    return row.values["label"]


def choose(rows, seed=42, **settings):
    return choose_splits(rows, DataConfig(**settings), seed=seed, label_of=label_of)


def problems_of(rows, **settings):
    with pytest.raises(UserError) as caught:
        choose(rows, **settings)
    return caught.value.problems


TRAIN = rows_of("ab" * 50, "train")
OTHER = rows_of("ab", "other")


@pytest.mark.parametrize("name", ["validation", "valid", "val", "dev"])
def test_usual_names_of_validation_are_found(name):
    splits, notes = choose({"train": TRAIN, name: OTHER, "test": OTHER})
    assert splits == {"train": TRAIN, "validation": OTHER, "test": OTHER}
    assert (notes == ()) == (name == "validation")


def test_a_missing_validation_split_is_cut_and_stated():
    splits, notes = choose({"train": TRAIN})
    assert notes == ("validation: 10 rows cut from train (10 %, by label, seed 42)",)
    assert Counter(map(label_of, splits["validation"])) == {"a": 5, "b": 5}
    assert sorted(splits["train"] + splits["validation"], key=lambda row: row.number) == list(TRAIN)
    assert list(splits) == ["train", "validation"]
    for rows in splits.values():
        assert [row.number for row in rows] == sorted(row.number for row in rows)


def test_the_cut_depends_on_the_seed():
    first, again, other = (choose({"train": TRAIN}, seed=s)[0]["validation"] for s in (1, 1, 2))
    assert first == again
    assert first != other


def test_the_cut_is_the_same_in_another_process_with_another_hash_seed():
    code = (
        "from lora_cli.config.tasks import DataConfig\n"
        "from lora_cli.data.splits import choose_splits\n"
        "from lora_cli.data.types import Row\n"
        "rows = tuple(Row(str(n), {}, 'f', n) for n in range(50))\n"
        "of = lambda row: 'xyz'[row.number % 3]\n"
        "splits, _ = choose_splits({'train': rows}, DataConfig(), seed=7, label_of=of)\n"
        "print([row.id for row in splits['validation']])"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(outputs) == 1
    assert outputs.pop().count("'") == 10


@given(
    st.lists(st.sampled_from("abcde"), min_size=2, max_size=60),
    st.floats(0.01, 0.99),
    st.integers(0, 99),
)
def test_a_cut_keeps_every_row_once_and_every_label_in_train(labels, fraction, seed):
    if max(Counter(labels).values()) < 2:
        labels = [*labels, labels[0]]
    rows = rows_of(labels)
    splits, _ = choose({"train": rows}, seed=seed, validation_split=fraction)
    train, cut = splits["train"], splits["validation"]
    assert sorted(row.number for row in train + cut) == [row.number for row in rows]
    assert set(map(label_of, train)) == set(labels)
    room = len(rows) - len(set(labels))
    assert len(cut) == min(max(round(fraction * len(rows)), 1), room)
    for label, size in Counter(labels).items():
        share = sum(label_of(row) == label for row in cut)
        if len(cut) < room and all(n > len(cut) for n in Counter(labels).values()):
            assert abs(share - len(cut) * size / len(rows)) < 1


def test_both_splits_can_be_cut():
    splits, notes = choose({"train": TRAIN}, validation_split=0.2, test_split=0.3)
    assert {name: len(rows) for name, rows in splits.items()} == {
        "train": 50,
        "validation": 20,
        "test": 30,
    }
    ids = [row.id for rows in splits.values() for row in rows]
    assert len(set(ids)) == 100
    assert [note.split(":")[0] for note in notes] == ["validation", "test"]


def test_named_splits():
    found = {"learn": TRAIN, "ood": OTHER, "test": OTHER}
    splits, notes = choose(found, train_split="learn", validation_split="ood", test_split="none")
    assert splits == {"train": TRAIN, "validation": OTHER}
    assert notes == ("validation: the 2 rows of split ood",)


def test_all_faulty_names_and_fractions_are_reported_together():
    problems = problems_of(
        {"train": TRAIN, "validation_ood": OTHER},
        train_split="trian",
        validation_split="validation_odd",
        test_split=1.5,
    )
    assert [problem.key for problem in problems] == [
        "task.data.train_split",
        "task.data.validation_split",
        "task.data.test_split",
    ]
    assert problems[0].fix == "task.data.train_split=train"
    assert problems[1].fix == "task.data.validation_split=validation_ood"
    assert problems[0].allowed == "train, validation_ood"


def test_validating_on_train_is_refused():
    problems = problems_of({"train": TRAIN}, validation_split="train")
    assert [problem.id for problem in problems] == ["data.split-is-train"]


def test_too_few_rows_to_cut():
    assert problems_of({"train": rows_of("ab")})[0].id == "data.too-few-rows"
    assert problems_of({"train": rows_of("a")})[0].id == "data.too-few-rows"


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, float("nan"), 2.0])
def test_fractions_are_checked(fraction):
    assert problems_of({"train": TRAIN}, validation_split=fraction)[0].id == "data.bad-fraction"


def test_limits_draw_in_order_and_are_stated():
    splits = {"train": TRAIN, "validation": OTHER, "test": rows_of("ab" * 9)}
    config = DataConfig(max_train_rows=10, max_eval_rows=5)
    limited, notes = limit_rows(splits, config, seed=1)
    assert [len(rows) for rows in limited.values()] == [10, 2, 5]
    assert [row.number for row in limited["train"]] == sorted(r.number for r in limited["train"])
    assert limited["train"] != TRAIN[:10]
    assert notes == (
        "train: 10 of 100 rows drawn (seed 1)",
        "test: 5 of 18 rows drawn (seed 1)",
    )
    assert limit_rows(splits, config, seed=1)[0] == limited
    assert limit_rows(splits, config, seed=2)[0] != limited
    assert limit_rows(splits, DataConfig(), seed=1) == (splits, ())


def test_splits_without_a_role_are_named():
    found = {"train": TRAIN, "evaluation": OTHER, "test_set": OTHER}
    notes = choose(found)[1]
    assert notes[-1].startswith("not used: evaluation (2 rows), test_set (2 rows); ")
    notes = choose(found, validation_split="evaluation", test_split="test_set")[1]
    assert not any("not used" in note for note in notes)


def test_a_split_that_was_declined_is_not_called_unused():
    found = {"train": TRAIN, "validation": OTHER, "test": OTHER}
    assert choose(found, test_split="none")[1] == ()
    (note,) = (n for n in choose(found, validation_split=0.1)[1] if "not used" in n)
    assert note.startswith("not used: validation (2 rows); ")


@pytest.mark.parametrize("settings", [{}, {"test_split": "test"}])
def test_one_split_cannot_validate_and_test(settings):
    found = {"train": TRAIN, "validation": OTHER, "test": OTHER}
    (problem,) = problems_of(found, validation_split="test", **settings)
    assert problem.id == "data.split-is-used-twice"
    assert problem.key == f"task.data.{'test' if settings else 'validation'}_split"
    splits, _ = choose(found, validation_split="test", test_split="none")
    assert splits == {"train": TRAIN, "validation": OTHER}


@pytest.mark.parametrize(
    ("is_training", "expected"),
    [(True, {"train": 30, "test": 5}), (False, {"train": 5, "test": 5})],
)
def test_train_is_evaluated_like_any_split_where_nothing_is_trained(is_training, expected):
    config = DataConfig(max_train_rows=30, max_eval_rows=5)
    limited, _ = limit_rows(
        {"train": TRAIN, "test": TRAIN}, config, seed=0, is_training=is_training
    )
    assert {split: len(rows) for split, rows in limited.items()} == expected


def test_a_cut_without_labels_does_not_claim_to_be_by_label():
    _, notes = choose_splits({"train": TRAIN}, DataConfig(), seed=42, label_of=lambda _: None)
    assert notes == ("validation: 10 rows cut from train (10 %, at random, seed 42)",)

"""Which rows train, validate and test.

A family calls `choose_splits`, then checks columns and learns label names from all of the rows,
then calls `limit_rows`: a small subset must not decide which labels there are.
"""

import random
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from lora_cli.config.tasks import DataConfig
from lora_cli.data.groups import Groups
from lora_cli.data.types import Row
from lora_cli.errors import Problem, UserError, nearest_name

DEFAULT_FRACTION = 0.1

_VALIDATION_NAMES = ("validation", "valid", "val", "dev")
_TEST_NAMES = ("test",)

RowsBySplit = dict[str, tuple[Row, ...]]


def choose_splits(
    rows: Mapping[str, tuple[Row, ...]],
    config: DataConfig,
    *,
    seed: int,
    label_of: Callable[[Row], Any],
    groups: Groups | None = None,
) -> tuple[RowsBySplit, tuple[str, ...]]:
    """Pick train, validation and, where there is one, test; cut what is missing from train.

    A cut takes the same share of every label, leaves each label at least one row in train, and
    depends on `seed` and the order of the rows alone.

    Args:
        rows: Every split that was found.
        config: Names or fractions of the splits.
        seed: Decides which rows are cut.
        label_of: What to balance a cut by; any value, compared as text; None where there is none.
        groups: Rows that are cut together instead, if any.

    Returns:
        The rows under "train", "validation" and, if any, "test"; and one sentence for each
        decision that the user did not spell out.

    Raises:
        UserError: If a split that is named does not exist, a fraction is out of range, or train
            is too small to be cut.
    """
    wanted = {
        "validation": _resolve_split(rows, config.validation_split, config, _VALIDATION_NAMES),
        "test": _resolve_split(rows, config.test_split, config, _TEST_NAMES),
    }
    if wanted["validation"] is None:
        wanted["validation"] = DEFAULT_FRACTION
    problems = _check_splits(rows, config, wanted)
    if problems:
        raise UserError(problems)
    cut = partial(_cut, label_of=label_of) if groups is None else groups.cut
    train = rows[config.train_split]
    whole = len(train)
    how = groups.how if groups else _how_drawn(train, label_of)
    chosen: RowsBySplit = {}
    notes: list[str] = []
    for split in ("test", "validation"):
        source = wanted[split]
        if isinstance(source, float):
            train, chosen[split] = cut(train, round(source * whole), split=split, seed=seed)
            notes.append(
                f"{split}: {len(chosen[split])} rows cut from {config.train_split} "
                f"({100 * source:g} %, {how}, seed {seed})"
            )
        elif source is not None:
            chosen[split] = rows[source]
            if source != split:
                notes.append(f"{split}: the {len(rows[source])} rows of split {source}")
    notes[:0] = _unused_notes(rows, config, wanted)
    order = ("validation", "test")
    named = {split: chosen[split] for split in order if split in chosen}
    return {"train": train, **named}, tuple(reversed(notes))


def without_empty(
    rows: Mapping[str, tuple[Row, ...]],
    notes: Sequence[str],
    *,
    named: Mapping[str, str | float | None],
) -> RowsBySplit:
    """Return the splits that have rows, after some were left out.

    Args:
        rows: The rows that are left, by split.
        notes: What was left out, a sentence each that begins with the name of the split.
        named: Splits that there must be, by the setting that names them; fractions are none.

    Raises:
        UserError: If nothing is left of one of these, or of all splits.
    """
    left = {split: found for split, found in rows.items() if found}
    empty = {key: name for key, name in named.items() if name in rows and name not in left}
    if left and not empty:
        return left
    key = next(iter(empty), "task.data.path")
    told = [note for note in notes if not empty or note.partition(":")[0] in empty.values()]
    raise UserError(
        Problem(
            id="data.no-rows-left",
            message=f"`{key}` must name rows that can be used, but all of them were left out.",
            key=key,
            where="; ".join(told),
            allowed=", ".join(left) or None,
            fix=f"{key}=NAME of another split" if empty and left else "name other rows",
        )
    )


def _how_drawn(rows: tuple[Row, ...], label_of: Callable[[Row], Any]) -> str:
    has_labels = any(label_of(row) is not None for row in rows)
    return "by label" if has_labels else "at random"


def _unused_notes(
    rows: Mapping[str, tuple[Row, ...]],
    config: DataConfig,
    wanted: Mapping[str, str | float | None],
) -> list[str]:
    """Return a sentence about the splits that have no role, unless test was declined."""
    declined = _TEST_NAMES if config.test_split == "none" else ()
    used = {config.train_split, *wanted.values(), *declined}
    unused = [f"{name} ({len(found)} rows)" for name, found in rows.items() if name not in used]
    if not unused:
        return []
    return [
        f"not used: {', '.join(unused)}; task.data.validation_split=NAME or "
        "task.data.test_split=NAME uses a split"
    ]


def _resolve_split(
    rows: Mapping[str, tuple[Row, ...]],
    value: str | float | None,
    config: DataConfig,
    usual: tuple[str, ...],
) -> str | float | None:
    """Return a split name, a fraction, or None if there is no such split."""
    if value is None:
        found = (name for name in usual if name in rows and name != config.train_split)
        return next(found, None)
    if value == "none" and usual == _TEST_NAMES and "none" not in rows:
        return None
    return value if isinstance(value, str) else float(value)


def _check_splits(
    rows: Mapping[str, tuple[Row, ...]],
    config: DataConfig,
    wanted: Mapping[str, str | float | None],
) -> list[Problem]:
    names, train = list(rows), config.train_split
    problems = _check_named("train", train, names)
    others = [name for name in names if name != train]
    for split, source in wanted.items():
        key = f"task.data.{split}_split"
        if isinstance(source, str):
            problems += _check_named(split, source, names, usable=others)
            if source == train:
                message = f"`{key}` must be another split than train, but is {source} as well."
                fix = f"{key}=0.1 cuts a tenth from train"
                problems.append(
                    Problem(id="data.split-is-train", message=message, key=key, fix=fix)
                )
        elif source is not None and not 0 < source < 1:
            problems.append(
                Problem(
                    id="data.bad-fraction",
                    message=f"`{key}` must be a fraction between 0 and 1, but is {source:g}.",
                    key=key,
                    allowed="a split name, or a number above 0 and below 1",
                    fix=f"{key}=0.1",
                )
            )
    if isinstance(wanted["test"], str) and wanted["test"] == wanted["validation"] != train:
        problems.append(_used_twice(wanted["test"], is_test_given=config.test_split is not None))
    return problems


def _used_twice(split: str, *, is_test_given: bool) -> Problem:
    return Problem(
        id="data.split-is-used-twice",
        message="`task.data.validation_split` must be another split than the test split, since "
        f"it selects the checkpoint, but both are {split}.",
        key="task.data.test_split" if is_test_given else "task.data.validation_split",
        fix="leave validation_split out, or set task.data.test_split=none",
    )


def _check_named(
    split: str, name: str, names: list[str], *, usable: list[str] | None = None
) -> list[Problem]:
    if name in names:
        return []
    key, good = f"task.data.{split}_split", usable or names
    return [
        Problem(
            id="data.no-such-split",
            message=f"`{key}` must name a split of the data, but there is no {name}.",
            key=key,
            allowed=", ".join(names),
            fix=f"{key}={nearest_name(name, good) or good[0]}",
        )
    ]


def _cut(
    rows: tuple[Row, ...],
    count: int,
    *,
    split: str,
    seed: int,
    label_of: Callable[[Row], Any],
) -> tuple[tuple[Row, ...], tuple[Row, ...]]:
    """Return (rows that stay, `count` rows cut off), both in the given order."""
    places: dict[str, list[int]] = defaultdict(list)
    for place, row in enumerate(rows):
        places[str(label_of(row))].append(place)
    shares = _share_out(max(count, 1), {label: len(group) for label, group in places.items()})
    generator = random.Random(f"{seed}/{split}")
    cut: set[int] = set()
    for label in sorted(places):
        cut.update(generator.sample(places[label], shares[label]))
    if not cut:
        raise UserError(
            Problem(
                id="data.too-few-rows",
                message=f"`train` must have enough rows to cut {split} from, but has {len(rows)}.",
                key=f"task.data.{split}_split",
                allowed="two rows of one label, at least",
                fix=f"add rows, or name a split: task.data.{split}_split=NAME",
            )
        )
    stay = tuple(row for place, row in enumerate(rows) if place not in cut)
    return stay, tuple(row for place, row in enumerate(rows) if place in cut)


def _share_out(count: int, sizes: Mapping[str, int]) -> dict[str, int]:
    """Divide `count` in proportion to `sizes` by largest remainder, leaving one in each group."""
    total = sum(sizes.values())
    exact = {label: count * size / total for label, size in sizes.items()}
    shares = {label: min(int(exact[label]), sizes[label] - 1) for label in sizes}
    room = total - len(sizes)
    # Labels that hit their limit leave more than one round of remainders to the others.
    while sum(shares.values()) < min(count, room):
        open_labels = (label for label in sizes if shares[label] < sizes[label] - 1)
        shares[min(open_labels, key=lambda label: (shares[label] - exact[label], label))] += 1
    return shares


def limit_rows(
    splits: Mapping[str, tuple[Row, ...]],
    config: DataConfig,
    *,
    seed: int,
    is_training: bool = True,
    groups: Groups | None = None,
) -> tuple[RowsBySplit, tuple[str, ...]]:
    """Draw at most `max_train_rows` rows of train and `max_eval_rows` of any other split.

    The rows stay in their order. Where nothing is trained, train may be evaluated like any other
    split, and `max_eval_rows` holds for it as well. What is evaluated keeps `groups` whole.
    """
    limited: RowsBySplit = {}
    notes: list[str] = []
    for split, rows in splits.items():
        limits = [] if split == "train" and is_training else [config.max_eval_rows]
        limits += [config.max_train_rows] if split == "train" else []
        most = min((limit for limit in limits if limit is not None), default=len(rows))
        if len(rows) <= most:
            limited[split] = rows
            continue
        is_evaluated = split != "train" or not is_training
        if groups is not None and groups.stay_whole and is_evaluated:
            limited[split] = groups.draw(rows, most, split=split, seed=seed)
        else:
            drawn = sorted(random.Random(f"{seed}/{split}/rows").sample(range(len(rows)), most))
            limited[split] = tuple(rows[place] for place in drawn)
        count = len(limited[split])
        notes.append(f"{split}: {count} of {len(rows)} rows drawn (seed {seed})")
    return limited, tuple(notes)

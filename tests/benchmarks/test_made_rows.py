"""Rows that are made of others, from a few that were made up."""

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture(scope="module")
def made_rows(script: Callable[[str], ModuleType]) -> Any:
    return script("made_rows")


def save(folder: Path, name: str, rows: list[dict[str, Any]]) -> None:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


def test_a_byte_order_mark_is_no_word(made_rows: Any, tmp_path: Path) -> None:
    marked = {"tokens": ["a", "\ufeff", "b"], "tags": ["O", "\ufeff", "B-x"]}
    save(tmp_path, "validation", [marked, {"tokens": ["c"], "tags": ["O"]}])
    assert made_rows.clean_words(tmp_path) == {
        "validation": [
            {"tokens": ["a", "b"], "tags": ["O", "B-x"]},
            {"tokens": ["c"], "tags": ["O"]},
        ]
    }


def test_the_right_choice_of_a_cloze_goes_on_with_its_text(made_rows: Any, tmp_path: Path) -> None:
    texts = {f"t{n} " + " ".join(f"w{n}-{place}" for place in range(13)) for n in range(9)}
    for name in ("train", "test"):
        save(tmp_path, name, [{"text": text} for text in [*sorted(texts), "too short"]])
    splits = made_rows.cloze(tmp_path)
    assert len(splits["train"]) == len(splits["test"]) == 9
    for row in splits["test"]:
        whole = [f"{row['context']} {choice}" for choice in row["choices"]]
        assert [text in texts for text in whole].index(True) == row["answer"]
        assert sum(text in texts for text in whole) == 1
        assert len(set(row["choices"])) == 4
    assert len({row["answer"] for row in splits["train"] + splits["test"]}) > 1


def test_entities_become_the_types_that_a_text_has(made_rows: Any, tmp_path: Path) -> None:
    tags = ["B-PER", "I-PER", "O", "B-LOC", "B-PER"]
    save(tmp_path, "train", [{"tokens": list("abcde"), "tags": tags}])
    made = {"train": [{"text": "a b c d e", "labels": ["LOC", "PER"]}]}
    assert made_rows.entity_types(tmp_path) == made


def test_films_have_any_number_of_genres_and_are_in_one_split(
    made_rows: Any, wheel: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(made_rows, "HELD_OUT", 1)
    splits = made_rows.genres(wheel([]))
    assert [len(rows) for rows in splits.values()] == [1, 1, 1]
    labels = {row["text"]: row["labels"] for rows in splits.values() for row in rows}
    assert labels == {
        'One "Quoted" (1990)': ["Drama"],
        "Two (1991)": ["Comedy", "Crime"],
        "Three ()": ["War"],
    }


def test_questions_about_computers_are_cut_from_one_list(made_rows: Any, tmp_path: Path) -> None:
    pairs = "".join(f"- - asked {n}\n  - told {n}\n" for n in range(250))
    path = tmp_path / "made-up.whl"
    with zipfile.ZipFile(path, "w") as file:
        name = "chatterbot_corpus/data/english/tech_support.yml"
        file.writestr(name, f"conversations:\n{pairs}")
    splits = made_rows.support(path)
    assert {name: len(rows) for name, rows in splits.items()} == {
        **{"train": 50, "validation": 100, "test": 100}
    }
    rows = [row for split in splits.values() for row in split]
    assert {row["prompt"] for row in rows} == {f"asked {n}" for n in range(250)}
    assert all(row["completion"] == row["prompt"].replace("asked", "told") for row in rows)


def test_all_descriptions_of_facts_count(made_rows: Any, tmp_path: Path) -> None:
    pairs = [{"source": f"f{n // 2}", "target": f"t{n}"} for n in range(12)]
    save(tmp_path, "validation", pairs)
    save(tmp_path, "train", [{"source": "f0", "target": "x"}, {"source": "f9", "target": "y"}])
    splits = made_rows.descriptions(tmp_path)
    assert splits["train"] == [{"source": "f9", "target": "y"}]
    evaluated = [*splits["validation"], *splits["test"]]
    assert len(splits["test"]) == 3
    assert sorted(row["source"] for row in evaluated) == [f"f{n}" for n in range(6)]
    for row in evaluated:
        number = int(row["source"][1:])
        assert row["target"] == [f"t{2 * number}", f"t{2 * number + 1}"]

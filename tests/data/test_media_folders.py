"""Folders of files as rows, and the datasets library on the same folders."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image
from tiny_vision import png

from lora_cli.data.media_folders import is_media_folder, read_media_folder, rows_of_media
from lora_cli.errors import UserError

CONTENT = png(Image.new("RGB", (2, 2)))


def write(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(CONTENT if path.suffix in (".png", ".JPG") else b"text")
    return folder


def read(folder: Path) -> tuple[dict[str, list[Any]], tuple[str, ...]]:
    assert is_media_folder(folder, "image")
    rows, notes = read_media_folder(folder, "image", file_split="train", key="task.data.path")
    return {split: [dict(row.values) for row in found] for split, found in rows.items()}, notes


SPLITS = (
    "train/cat/1.png",
    "train/cat/2.JPG",
    "train/dog/1.png",
    "test/cat/9.png",
    "test/dog/3.png",
)


def test_labels_are_those_of_the_datasets_library(tmp_path: Path) -> None:
    folder = write(tmp_path / "pets", *SPLITS)
    found, notes = read(folder)
    assert notes == ()
    theirs = datasets.load_dataset(
        "imagefolder", data_dir=str(folder), cache_dir=str(tmp_path / "cache")
    ).cast_column("image", datasets.Image(decode=False))
    for split, table in theirs.items():
        names = table.features["label"].names
        wanted = {(Path(row["image"]["path"]).name, names[row["label"]]) for row in table}
        assert {(Path(row["image"]).name, row["label"]) for row in found[split]} == wanted


def test_folders_of_labels_alone_are_one_split(tmp_path: Path) -> None:
    found, _ = read(write(tmp_path, "b/1.png", "a/2.png", "a/deep/3.png"))
    assert found == {
        "train": [
            {"image": "a/2.png", "label": "a"},
            {"image": "a/deep/3.png", "label": "a"},
            {"image": "b/1.png", "label": "b"},
        ]
    }


def test_a_label_may_be_called_train(tmp_path: Path) -> None:
    found, _ = read(write(tmp_path, "train/1.png", "bus/2.png"))
    assert [row["label"] for row in found["train"]] == ["bus", "train"]


def test_other_names_of_splits(tmp_path: Path) -> None:
    found, _ = read(write(tmp_path, "training/a/1.png", "val/a/2.png", "testing/a/3.png"))
    assert list(found) == ["train", "validation", "test"]


def test_splits_beside_labels_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "train/a/1.png", "test/a/1.png", "extra/a/1.png")
    with pytest.raises(UserError, match="has extra, test, train"):
        read(tmp_path)


def test_two_folders_for_one_split_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "train/a/1.png", "val/a/1.png", "dev/a/1.png")
    with pytest.raises(UserError, match="dev, train, val"):
        read(tmp_path)


def test_files_without_a_label_are_told(tmp_path: Path) -> None:
    _, notes = read(write(tmp_path, "train/a/1.png", "train/b/1.png", "train/lost.png"))
    assert notes == ("left out 1 files without a row or label: train/lost.png",)


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_metadata_of_a_split(tmp_path: Path, kind: str) -> None:
    for split in ("train", "test"):
        write(tmp_path, f"{split}/1.png", f"{split}/in/2.png", f"{split}/3.png")
        rows = [{"file_name": "1.png", "label": "x"}, {"file_name": "in/2.png", "label": "y"}]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        if kind == "csv":
            text = "file_name,label\n1.png,x\nin/2.png,y\n"
        (tmp_path / split / f"metadata.{kind}").write_text(text)
    found, notes = read(tmp_path)
    assert found["test"] == [
        {"image": "test/1.png", "label": "x"},
        {"image": "test/in/2.png", "label": "y"},
    ]
    assert "left out 2 files without a row or label: train/3.png, test/3.png" in notes[0]


def test_metadata_above_the_splits(tmp_path: Path) -> None:
    write(tmp_path, "train/1.png", "test/2.png")
    (tmp_path / "metadata.csv").write_text("file_name,label\ntrain/1.png,x\ntest/2.png,y\n")
    found, _ = read(tmp_path)
    assert {split: [row["label"] for row in rows] for split, rows in found.items()} == {
        "train": ["x"],
        "test": ["y"],
    }


def test_metadata_without_names_of_files_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "1.png")
    (tmp_path / "metadata.csv").write_text("file,label\n1.png,x\n")
    with pytest.raises(UserError, match="must have a column file_name") as caught:
        read(tmp_path)
    assert caught.value.problems[0].where == str(tmp_path / "metadata.csv")


def test_rows_to_predict(tmp_path: Path) -> None:
    write(tmp_path, "b.png", "in/a.png", "note.txt", ".hidden.png")
    rows = rows_of_media(tmp_path)
    assert [(row.id, dict(row.values)) for row in rows] == [
        ("b.png", {"image": "b.png"}),
        ("in/a.png", {"image": "in/a.png"}),
    ]
    (one,) = rows_of_media(tmp_path / "b.png")
    assert (one.id, one.values["image"]) == ("b.png", "b.png")
    assert rows_of_media(tmp_path / "note.txt") == ()
    (sound,) = rows_of_media(write(tmp_path / "sounds", "x.wav"))
    assert sound.values == {"audio": "x.wav"}

"""Places of files: what is found, and what is said of what is not."""

import os
import pickle
from pathlib import Path

import pytest

from lora_cli.data.media import (
    MediaError,
    UnreadableError,
    list_places,
    locate,
    media_name,
    read_media,
    read_place,
    without_place,
)
from lora_cli.data.types import Row


def row(value: object, folder: Path, number: int = 1) -> Row:
    return Row(str(number), {"image": value}, str(folder / "rows.csv"), number)


def test_paths_are_relative_to_the_data_file(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"bytes")
    place = locate("a.png", str(tmp_path / "rows.csv"))
    assert place["file"] == str(tmp_path / "a.png")
    assert (place["path"], place["size"]) == ("a.png", 5)
    assert read_place(place) == b"bytes"
    assert locate(str(tmp_path / "a.png"), "elsewhere/rows.csv")["file"] == place["file"]
    assert locate(place, "elsewhere") is place
    assert locate({"path": "a.png", "bytes": None}, str(tmp_path / "rows.csv")) == place


def test_bytes_of_a_row_are_taken_as_they_are(tmp_path: Path) -> None:
    assert read_place(locate({"path": "x.png", "bytes": b"ab"}, "rows.parquet")) == b"ab"
    assert read_place(locate(b"ab", "rows.parquet")) == b"ab"
    with pytest.raises(MediaError, match="without bytes"):
        read_place(locate(b"", "rows.parquet"))


def test_what_is_no_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty.png").touch()
    os.mkfifo(tmp_path / "pipe")
    faults = {
        "gone.png": "no such file or directory",
        "empty.png": "an empty file",
        "pipe": "no regular file",
        ".": "a folder",
        " ": "an empty path",
        "a\0b": "null",
        None: "null",
        7: "a value of type int in place of a path",
    }
    for value, reason in faults.items():
        with pytest.raises(MediaError, match=reason):
            locate(value, str(tmp_path / "rows.csv"))


def test_all_that_is_missing_is_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"x")
    rows = [row("a.png" if n == 3 else f"{n}.png", tmp_path, n) for n in range(1, 15)]
    places, faults = list_places(rows, "image")
    assert [place is not None for place in places] == [n == 3 for n in range(1, 15)]
    (problem,) = UnreadableError("image", faults).problems
    assert "13 cannot be" in problem.message
    where = problem.where or ""
    assert where.startswith(f"1.png of {tmp_path}/rows.csv row 1 (no such file")
    assert where.endswith("and 3 more")


def test_the_error_names_the_row_and_crosses_processes(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"x")

    def refuse(content: bytes) -> None:
        raise MediaError("not nice")

    with pytest.raises(UnreadableError) as caught:
        read_media(row("a.png", tmp_path), "image", "image", refuse)
    again = pickle.loads(pickle.dumps(caught.value))
    assert again.found == ((f"a.png of {tmp_path}/rows.csv row 1", "not nice"),)
    assert again.problems == caught.value.problems


def test_a_folder_is_named_without_row_numbers(tmp_path: Path) -> None:
    value = {"path": "cat/1.png", "file": "x", "size": 1, "modified": 2}
    assert media_name(Row("1", {"image": value}, f"{tmp_path}/", 1), "image") == (
        f"{tmp_path}/cat/1.png"
    )


def test_a_copy_elsewhere_is_the_same_row() -> None:
    value = {"path": "cat/1.png", "file": "x", "size": 1, "modified": 2}
    moved = {**value, "file": "y", "modified": 3}
    assert without_place(value) == without_place(moved) == {"path": "cat/1.png", "size": 1}
    assert without_place([value, "a"]) == without_place([moved, "a"])
    assert without_place("text") == "text"

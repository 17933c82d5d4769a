"""Boxes of rows, and where the files of COCO and their images are."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from lora_cli.data.boxes import coco_files, cut_box, fit_box, place_images, read_objects
from lora_cli.data.media import MediaError
from lora_cli.data.types import Row

BOX = [1, 2, 3.5, 4]


@pytest.mark.parametrize(
    "value",
    [
        {"bbox": [BOX, BOX], "category": ["cat", 3], "area": [14, 14]},
        [{"bbox": BOX, "category": "cat"}, {"bbox": BOX, "category": 3}],
    ],
)
def test_objects_are_in_one_of_two_layouts(value: Any) -> None:
    assert read_objects(value) == [(BOX, "cat"), (BOX, "3")]


def test_there_may_be_none() -> None:
    assert read_objects({"bbox": [], "category": []}) == read_objects([]) == []


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "null"),
        ("cat", "neither an object nor a list"),
        ({"bbox": [BOX]}, "without the lists bbox and category"),
        ({"bbox": [BOX], "category": []}, "1 boxes with 0 categories"),
        ({"bbox": [BOX], "category": [None]}, "object 1 has no category"),
        ({"bbox": [BOX, BOX[:3]], "category": [1, 2]}, "box of object 2 is no list of four"),
        ([{"bbox": [1, 2, 3, float("nan")], "category": 1}], "box of object 1 is no list"),
    ],
)
def test_other_values_are_refused(value: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        read_objects(value)


def test_boxes_become_corners() -> None:
    assert fit_box([2, 3, 4, 5], (10, 9), has_corners=False) == (2, 3, 6, 8)
    assert fit_box([2, 3, 4, 5], (10, 9), has_corners=True) == (2, 3, 4, 5)
    # What rounding did is taken back.
    assert fit_box([-0.5, 0, 11, 9], (10, 9), has_corners=False) == (0, 0, 10, 9)


@pytest.mark.parametrize(
    ("box", "reason"),
    [
        ([2, 3, 0, 5], "is empty"),
        ([2, 3, -1, 5], "is empty"),
        ([2, 3, 4, 8], "not inside of 10 x 9 pixels"),
        ([-2, 3, 4, 5], "not inside"),
        ([10.2, 3, 0.5, 5], "not inside"),
    ],
)
def test_boxes_that_cannot_be_are_refused(box: list[float], reason: str) -> None:
    with pytest.raises(MediaError, match=reason):
        fit_box(box, (10, 9), has_corners=False)


def test_what_is_inside_is_kept_where_that_is_asked_for() -> None:
    assert cut_box([-2, 3, 4, 50], (10, 9), has_corners=False) == (0, 3, 2, 9)
    assert cut_box([2, 3, 0, 5], (10, 9), has_corners=False) is None
    assert cut_box([12, 3, 14, 5], (10, 9), has_corners=True) is None


def test_the_files_of_splits_are_found(tmp_path: Path) -> None:
    for name in ("annotations/instances_val2017.json", "annotations/instances_train2017.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    (tmp_path / "annotations" / "captions_train2017.json").write_text("{}")
    assert {split: path.name for split, path in coco_files(tmp_path).items()} == {
        "train": "instances_train2017.json",
        "validation": "instances_val2017.json",
    }
    other = tmp_path / "other" / "valid" / "_annotations.coco.json"
    other.parent.mkdir(parents=True)
    other.write_text("{}")
    assert coco_files(tmp_path / "other") == {"validation": other}
    assert coco_files(tmp_path / "annotations" / "none") == {}


@pytest.mark.parametrize(
    "folder", ["annotations", "annotations/images", "train2017", "images", "images/train2017"]
)
def test_the_folder_of_the_images_is_found(tmp_path: Path, folder: str) -> None:
    source = tmp_path / "annotations" / "instances_train2017.json"
    for path in (source, tmp_path / folder / "a.jpg"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({}))
    row = Row("1", {"image": "a.jpg", "objects": []}, str(source), 1)
    (found,) = place_images([row])
    assert (source.parent / found.values["image"]).resolve() == tmp_path / folder / "a.jpg"
    assert found.values["objects"] == []


def test_images_that_are_nowhere_keep_their_names(tmp_path: Path) -> None:
    row = Row("1", {"image": "gone.jpg"}, str(tmp_path / "instances_train.json"), 1)
    assert place_images([row]) == (row,)
    assert place_images([]) == ()


def test_the_only_json_file_of_a_folder_is_one_of_coco(tmp_path: Path) -> None:
    (tmp_path / "coco.json").write_text("{}")
    (tmp_path / "0.png").write_bytes(b"x")
    assert coco_files(tmp_path) == {"train": tmp_path / "coco.json"}
    (tmp_path / "other.json").write_text("{}")
    assert coco_files(tmp_path) == {}


def test_rows_of_a_folder_of_images_keep_their_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("det").mkdir()
    Path("det/0.png").write_bytes(b"x")
    rows = (Row("1", {"image": "0.png"}, f"det{os.sep}", 1),)
    assert place_images(rows) == rows

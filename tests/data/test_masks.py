"""Masks of all kinds of files, and folders of them."""

import base64
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny_vision import png

from lora_cli.data.masks import mask_png, pair_masks, read_mask
from lora_cli.data.media import MediaError
from lora_cli.data.types import Row

NUMBERS = np.array([[0, 1, 2], [3, 255, 1]], np.uint8)


def read(image: Any, format_: str = "PNG", *, ignored: int = 255, zero: bool = False) -> Any:
    return read_mask(png(image, format_), ignored=ignored, zero_is_ignored=zero).tolist()


def test_a_grey_image_holds_the_numbers() -> None:
    assert read(Image.fromarray(NUMBERS)) == [[0, 1, 2], [3, -1, 1]]
    assert read(Image.fromarray(NUMBERS), "TIFF", ignored=3) == [[0, 1, 2], [-1, 255, 1]]


def test_the_places_in_a_palette_are_the_numbers_and_not_its_colours() -> None:
    image = Image.fromarray(NUMBERS, "L")
    image.putpalette([channel for _ in range(256) for channel in (9, 8, 7)])
    assert image.mode == "P"
    assert read(image) == [[0, 1, 2], [3, -1, 1]]


def test_images_of_one_and_of_sixteen_bits() -> None:
    assert read(Image.fromarray(NUMBERS > 0)) == [[0, 1, 1], [1, 1, 1]]
    assert read(Image.fromarray(NUMBERS.astype(np.uint16) * 100), ignored=300) == [
        [0, 100, 200],
        [-1, 25500, 100],
    ]


def test_zero_may_be_no_class() -> None:
    assert read(Image.fromarray(NUMBERS), zero=True) == [[-1, 0, 1], [2, -1, 0]]


@pytest.mark.parametrize(
    ("mode", "format_", "reason"),
    [
        ("RGB", "PNG", "RGB colours in place of the number of a class"),
        ("RGBA", "PNG", "RGBA colours"),
        ("L", "JPEG", "a jpg, which does not keep numbers"),
    ],
)
def test_other_images_are_refused(mode: str, format_: str, reason: str) -> None:
    with pytest.raises(MediaError, match=reason):
        read(Image.new(mode, (4, 4)), format_)


@pytest.mark.parametrize("most", [3, 300])
def test_a_mask_is_written_as_it_is_read(most: int) -> None:
    classes = np.array([[0, 1], [2, most]], np.int32)
    image = Image.open(BytesIO(base64.b64decode(mask_png(classes))))
    assert np.array(image).tolist() == classes.tolist()


def rows(*names: str) -> tuple[Row, ...]:
    kinds = ("images", "masks", "annotations", "cat")
    return tuple(
        Row(
            name,
            {"image": name, "label": next(part for part in name.split("/") if part in kinds)},
            "folder/",
            number,
        )
        for number, name in enumerate(names)
    )


def test_images_and_masks_of_one_name_are_one_row() -> None:
    found = pair_masks({"train": rows("train/images/a.jpg", "train/masks/a.png")})
    assert found is not None
    (row,) = found["train"]
    assert row.id == "train/images/a.jpg"
    assert row.values == {"image": "train/images/a.jpg", "mask": "train/masks/a.png"}


def test_splits_may_be_below_the_two_folders() -> None:
    names = [
        f"{kind}/{split}/a.png"
        for kind in ("images", "annotations")
        for split in ("training", "val")
    ]
    found = pair_masks({"train": rows(*names)})
    assert found is not None
    assert {split: [row.values["mask"] for row in own] for split, own in found.items()} == {
        "train": ["annotations/training/a.png"],
        "validation": ["annotations/val/a.png"],
    }


def test_a_mask_that_is_not_there_is_named() -> None:
    found = pair_masks({"train": rows("images/x/a.jpg", "images/x/b.jpg", "masks/x/a.png")})
    assert found is not None
    assert [row.values["mask"] for row in found["train"]] == ["masks/x/a.png", "masks/x/b.png"]


def test_other_folders_are_left_alone() -> None:
    assert pair_masks({"train": rows("images/a.png", "cat/a.png")}) is None
    assert pair_masks({"train": (Row("1", {"image": "a", "mask": "b"}, "f", 1),)}) is None

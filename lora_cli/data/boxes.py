"""Boxes around things in images: as objects in a column, and in the files of COCO.

A row has ``objects``: ``{"bbox": [[...], ...], "category": [...]}``, or a list of objects with
``bbox`` and ``category``. A file of COCO becomes such rows, see `lora_cli.data.coco`.
"""

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_cli.data.columns import canonical_label
from lora_cli.data.media import MediaError
from lora_cli.data.media_folders import SPLIT_NAMES
from lora_cli.data.types import Row

Box = tuple[float, float, float, float]

_SPLIT_FILE = re.compile(r"instances_([a-z]+?)\d*")
_IN_SPLIT = "_annotations.coco.json"
# Boxes of whole pixels around a thing may go over the edge by rounding.
_ROUNDING = 1.0


def coco_files(folder: Path) -> dict[str, Path]:
    """Return the files of COCO in a folder by split; none where there are no such.

    They are ``instances_train2017.json``, in it or in its folder ``annotations``, or
    ``train/_annotations.coco.json``; the only file that ends in .json is taken for train.
    """
    found = {}
    for path in sorted((*folder.glob("*.json"), *folder.glob("annotations/*.json"))):
        named = _SPLIT_FILE.fullmatch(path.stem.lower())
        if named and named[1] in SPLIT_NAMES:
            found[SPLIT_NAMES[named[1]]] = path
    for path in sorted(folder.glob(f"*/{_IN_SPLIT}")):
        if (name := path.parent.name.lower()) in SPLIT_NAMES:
            found[SPLIT_NAMES[name]] = path
    alone = sorted(folder.glob("*.json"))
    if not found and len(alone) == 1:
        return {"train": alone[0]}
    order = ("train", "validation", "test")
    return {split: found[split] for split in order if split in found}


def place_images(rows: Sequence[Row]) -> tuple[Row, ...]:
    """Return rows of one file of COCO with the paths of their images from its folder.

    The images are beside the file, in a folder ``images`` or one that is called after the file
    (``train2017``), there or one folder up. Rows stay as they are where none has the first image.
    """
    if not rows or not isinstance(rows[0].values.get("image"), str):
        return tuple(rows)
    if rows[0].source.endswith(os.sep):
        # Rows of a folder of images, whose paths are known.
        return tuple(rows)
    source = Path(rows[0].source)
    part = source.stem.rpartition("_")[2]
    folders = ("", part, "images", f"images/{part}", "..", f"../{part}", "../images")
    for folder in (*folders, f"../images/{part}"):
        if (source.parent / folder / rows[0].values["image"]).is_file():
            return tuple(
                replace(row, values={**row.values, "image": f"{folder}/{row.values['image']}"})
                if folder
                else row
                for row in rows
            )
    return tuple(rows)


def read_objects(value: Any) -> list[tuple[Any, str]]:
    """Return the box and the category of each object that a row holds.

    Raises:
        ValueError: If the value is none of the two layouts; the text says what is wrong.
    """
    if isinstance(value, Mapping):
        boxes, categories = value.get("bbox"), value.get("category")
        if not isinstance(boxes, list) or not isinstance(categories, list):
            raise ValueError("an object without the lists bbox and category")
    elif isinstance(value, list) and all(isinstance(item, Mapping) for item in value):
        boxes, categories = ([item.get(name) for item in value] for name in ("bbox", "category"))
    else:
        raise ValueError("null" if value is None else "neither an object nor a list of objects")
    if len(boxes) != len(categories):
        raise ValueError(f"{len(boxes)} boxes with {len(categories)} categories")
    labels = [canonical_label(category) for category in categories]
    found = [(box, label) for box, label in zip(boxes, labels, strict=True) if label is not None]
    if len(found) < len(labels):
        raise ValueError(f"object {labels.index(None) + 1} has no category")
    for number, (box, _) in enumerate(found, start=1):
        if not _is_box(box):
            raise ValueError(f"the box of object {number} is no list of four numbers")
    return found


def fit_box(box: Sequence[float], size: tuple[int, int], *, has_corners: bool) -> Box:
    """Return the corners (left, top, right, bottom) of a box, in pixels, inside of an image.

    Args:
        box: (left, top, width, height), or its corners.
        size: Width and height of the image.
        has_corners: Whether the box is given by its corners.

    Raises:
        MediaError: If the box is empty, or more than a pixel of it is outside.
    """
    whole, (width, height) = _corners(box, has_corners=has_corners), size
    shown = f"the box {[round(float(side), 2) for side in box]}"
    if _is_empty(whole):
        raise MediaError(f"{shown} is empty")
    found = _cut(whole, size)
    over = max(abs(before - after) for before, after in zip(whole, found, strict=True))
    if over > _ROUNDING or _is_empty(found):
        raise MediaError(f"{shown} is not inside of {width} x {height} pixels")
    return found


def cut_box(box: Sequence[float], size: tuple[int, int], *, has_corners: bool) -> Box | None:
    """Return the corners of what of a box is inside of an image, or None if that is nothing.

    Args:
        box: As `fit_box`, and so are the others.
        size: Width and height of the image.
        has_corners: Whether the box is given by its corners.
    """
    found = _cut(_corners(box, has_corners=has_corners), size)
    return None if _is_empty(found) else found


def _corners(box: Sequence[float], *, has_corners: bool) -> Box:
    left, top, right, bottom = box
    return (left, top, right, bottom) if has_corners else (left, top, left + right, top + bottom)


def _cut(corners: Box, size: tuple[int, int]) -> Box:
    (left, top, right, bottom), (width, height) = corners, size
    return max(left, 0.0), max(top, 0.0), min(right, width), min(bottom, height)


def _is_empty(corners: Box) -> bool:
    return corners[2] <= corners[0] or corners[3] <= corners[1]


def _is_box(value: Any) -> bool:
    return (
        isinstance(value, list | tuple)
        and len(value) == 4
        and all(
            isinstance(side, int | float) and not isinstance(side, bool) and math.isfinite(side)
            for side in value
        )
    )

"""Masks: images that hold the number of a class for each pixel of a picture, and their files.

A mask has one channel, or a palette, whose places are the numbers.
"""

import base64
from collections.abc import Mapping
from dataclasses import replace
from io import BytesIO
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_cli.data.images import load_image
from lora_cli.data.media import MediaError
from lora_cli.data.media_folders import SPLIT_NAMES
from lora_cli.data.types import Row

Mask = NDArray[np.int32]

_NUMBERED = ("1", "L", "P", "I")
# Names of the folders that stand beside a folder called "images".
_FOLDERS = ("masks", "annotations", "labels")
_IMAGES = "images"


def read_mask(content: bytes, *, ignored: int, zero_is_ignored: bool) -> Mask:
    """Return the class of each pixel, from 0, of shape (H, W); -1 where there is none.

    Args:
        content: An image file.
        ignored: Number in the file that is no class.
        zero_is_ignored: Whether 0 is none either, and 1 is the first class.

    Raises:
        MediaError: If it is no mask.
    """
    image = load_image(content)
    if image.format == "JPEG":
        raise MediaError("a jpg, which does not keep numbers")
    if image.mode not in _NUMBERED and not image.mode.startswith("I;16"):
        raise MediaError(f"{image.mode} colours in place of the number of a class")
    numbers = np.array(image).astype(np.int32)
    mask = numbers - 1 if zero_is_ignored else numbers.copy()
    mask[numbers == ignored] = -1
    return mask


def resize_mask(mask: Any, size: tuple[int, int]) -> Any:
    """Return an image of numbers in another size (W, H), each pixel the nearest one of before."""
    from PIL import Image

    return mask.resize(size, Image.Resampling.NEAREST)


def mask_image(mask: Mask) -> Any:
    """Return a mask as an image of Pillow, which can be cut and mirrored as its picture is."""
    from PIL import Image

    return Image.fromarray(mask)


def mask_png(classes: NDArray[Any]) -> str:
    """Return a PNG with the number of a class for each pixel, in base64.

    It is grey, of 8 bits, or of 16 where there are larger numbers than 255.
    """
    from PIL import Image

    content = BytesIO()
    kind = np.uint8 if classes.max(initial=0) < 256 else np.uint16
    Image.fromarray(classes.astype(kind)).save(content, "PNG")
    return base64.b64encode(content.getvalue()).decode()


def pair_masks(splits: Mapping[str, tuple[Row, ...]]) -> dict[str, tuple[Row, ...]] | None:
    """Return rows with an image and its mask, if there are folders of images and of masks.

    ``images/a.jpg`` goes with ``masks/a.png``, in each split or above the splits
    (``images/train/a.jpg``). A mask that is not there is named all the same, so that it is missed
    with the others.

    Args:
        splits: Rows of a folder, whose labels are the names of the first folders in it.

    Returns:
        Rows with ``image`` and ``mask``, or None where there are no such folders.
    """
    labels = {row.values.get("label") for rows in splits.values() for row in rows}
    second = next((name for name in _FOLDERS if labels == {_IMAGES, name}), None)
    if second is None:
        return None
    found: dict[str, list[Row]] = {}
    for split, rows in splits.items():
        masks = {_inside(row).with_suffix(""): row for row in rows if row.values["label"] == second}
        for row in (row for row in rows if row.values["label"] == _IMAGES):
            inside = _inside(row)
            own = SPLIT_NAMES.get(inside.parts[0].lower(), split) if inside.parts[1:] else split
            mask = masks.get(inside.with_suffix(""))
            image = PurePosixPath(row.values["image"])
            missed = PurePosixPath(*image.parts[: -len(inside.parts) - 1], second)
            values = {
                "image": row.values["image"],
                "mask": str(missed / inside.with_suffix(".png"))
                if mask is None
                else mask.values["image"],
            }
            found.setdefault(own, []).append(replace(row, values=values))
    return {split: tuple(rows) for split, rows in found.items()}


def _inside(row: Row) -> PurePosixPath:
    """Return the path of a file below the folder that is its label."""
    parts = PurePosixPath(row.values["image"]).parts
    return PurePosixPath(*parts[parts.index(row.values["label"]) + 1 :])


def classes_in(mask: Mask) -> int:
    """Return how many classes there are up to the largest number of a mask."""
    return int(mask.max(initial=-1)) + 1

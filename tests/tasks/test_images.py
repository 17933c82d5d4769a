"""The reader of images, beside the processor of transformers."""

import random
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from tiny_vision import PIXELS, png, striped

from lora_cli.config.media import AugmentationConfig
from lora_cli.data.types import Row
from lora_cli.tasks.images import ImageReader

COLUMNS = {"image": "image", "label": None}
NOTHING = AugmentationConfig(crop_scale=1, flip=0, color_jitter=0)
PROCESSOR = transformers.ViTImageProcessorPil(size={"height": PIXELS, "width": PIXELS})


def write(folder: Path, count: int = 3) -> list[Row]:
    draw, rows = random.Random(0), []
    for number in range(count):
        (folder / f"{number}.png").write_bytes(png(striped("red", draw)))
        rows.append(Row(str(number), {"image": f"{number}.png"}, f"{folder}/", number))
    return rows


def read(rows: list[Row], how: AugmentationConfig = NOTHING, **more: Any) -> torch.Tensor:
    reader = ImageReader(PROCESSOR, COLUMNS, augmentation=how)
    features = [reader.encode(row) for row in rows]
    batch = {"ids": [row["id"] for row in features], **reader.collate(features), **more}
    return reader.inputs(batch, lambda: None)["pixel_values"]


def test_images_are_what_the_processor_makes_of_them(tmp_path: Path) -> None:
    rows = write(tmp_path)
    files = [Image.open(tmp_path / f"{number}.png") for number in range(3)]
    wanted = PROCESSOR(images=files, return_tensors="pt")["pixel_values"]
    assert torch.equal(read(rows), wanted)
    assert torch.equal(read(rows, seed=5), wanted)


def test_images_are_changed_in_training_alone(tmp_path: Path) -> None:
    rows, how = write(tmp_path), AugmentationConfig()
    assert torch.equal(read(rows, how), read(rows))
    first = read(rows, how, seed=5)
    assert not torch.equal(first, read(rows))
    assert not torch.equal(first, read(rows, how, seed=6))
    # In another batch, and at another place of it.
    assert torch.equal(read(rows[::-1], how, seed=5)[-1], first[0])


def test_sizes_that_look_like_channels(tmp_path: Path) -> None:
    rows = []
    for number, size in enumerate([(3, 3), (1, 1), (3, 20), (200, 1)]):
        (tmp_path / f"{number}.png").write_bytes(png(Image.new("RGB", size, (255, 0, 0))))
        rows.append(Row(str(number), {"image": f"{number}.png"}, f"{tmp_path}/", number))
    found = read(rows)
    assert found.shape == (4, 3, PIXELS, PIXELS)
    assert torch.allclose(found[:, 0], torch.ones(()))
    assert torch.allclose(found[:, 1:], -torch.ones(()))


def test_what_a_row_costs_and_measures(tmp_path: Path) -> None:
    (row, *_) = write(tmp_path)
    features = ImageReader(PROCESSOR, COLUMNS, augmentation=NOTHING).encode(row)
    place = features.pop("place")
    assert (place["path"], place["file"]) == ("0.png", str(tmp_path / "0.png"))
    assert features == {
        "id": "0",
        "length": 1,
        "cut": 0,
        "supervised": 1,
        "measures": {"width": 20, "height": 18},
        "kinds": {"format": "PNG", "mode": "RGB"},
    }

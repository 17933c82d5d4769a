"""Images and masks that are changed alike."""

import random
from pathlib import Path
from typing import Any

import torch
from tiny_scenes import PIXELS, scene
from transformers import SegformerImageProcessorPil

from lora_cli.config.media import MaskAugmentationConfig, SemanticSegmentationConfig
from lora_cli.data.media import locate
from lora_cli.tasks.masked_images import MaskedImageReader


def reader_and_batch(folder: Path) -> tuple[MaskedImageReader, dict[str, Any]]:
    draw, places, masks = random.Random(0), [], []
    for number in range(4):
        for found, image, kind in zip(
            (places, masks), scene(draw)[:2], ("image", "mask"), strict=True
        ):
            image.save(folder / f"{number}-{kind}.png")
            found.append(locate(f"{number}-{kind}.png", f"{folder}/"))
    how = MaskAugmentationConfig(crop_scale=0.3, flip=0.5, color_jitter=0)
    processor = SegformerImageProcessorPil(size={"height": PIXELS, "width": PIXELS})
    reader = MaskedImageReader(
        processor, {"image": "image"}, SemanticSegmentationConfig(augmentation=how)
    )
    return reader, {"ids": list("abcd"), "places": places, "masks": masks}


def test_a_mask_is_cut_and_mirrored_with_its_image(tmp_path: Path) -> None:
    reader, batch = reader_and_batch(tmp_path)
    batch |= {"seed": 1}
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    inputs = reader.inputs(batch, lambda: None)["pixel_values"]
    pixels = inputs * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]
    red, blue = pixels[:, 0] - pixels[:, 2] > 0.5, pixels[:, 2] - pixels[:, 0] > 0.5
    labels = reader.labels(batch, (PIXELS, PIXELS))
    agree = torch.where(red, 1, torch.where(blue, 2, 0)) == labels
    assert agree[labels >= 0].float().mean() > 0.97
    plain = {name: value for name, value in batch.items() if name != "seed"}
    still = reader.labels(plain, (PIXELS, PIXELS))
    assert (still != labels).float().mean() > 0.1
    other = reader.labels({**batch, "seed": 2}, (PIXELS, PIXELS))
    assert not torch.equal(other, labels)
    assert torch.equal(reader.labels(batch, (PIXELS, PIXELS)), labels)

"""Images as inputs of a row."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from lora_cli.config.media import AugmentationConfig
from lora_cli.data import made_up
from lora_cli.data.augmentation import Augmentation, augment
from lora_cli.data.images import describe_image, read_image
from lora_cli.data.media import read_place
from lora_cli.tasks.contract import Features
from lora_cli.tasks.media import MediaFamily, MediaReader
from lora_cli.tasks.rows import Columns, Role

IMAGE = Role(
    "image",
    ("image", "img", "images", "image_path", "image_file", "file_name", "filename", "file", "path"),
    made_up=made_up.picture,
)


class ImageFamily(MediaFamily):
    """Rows with an image."""

    kind, module, extra = "image", "PIL", "vision"
    processor = "image processor"
    inputs = (IMAGE,)


class ImageReader(MediaReader):
    """Reads images, changed at random in training, in the size and colours of the model.

    Args:
        processor: Of the model.
        columns: Of the rows, by role.
        augmentation: What is changed in training.
    """

    kind = "image"

    def __init__(
        self, processor: Any, columns: Columns, *, augmentation: AugmentationConfig
    ) -> None:
        super().__init__(processor, columns)
        self._augmentation = Augmentation(
            crop_scale=augmentation.crop_scale,
            flip=augmentation.flip,
            color_jitter=augmentation.color_jitter,
            operations=augmentation.rand_augment,
            strength=augmentation.rand_augment_strength,
        )

    def describe(self, content: bytes) -> Features:
        """Return width, height, format and mode of an image."""
        return describe_image(content)

    def process(
        self, places: Sequence[Mapping[str, Any]], ids: Sequence[str], *, seed: int | None
    ) -> Mapping[str, torch.Tensor]:
        """Return what the processor makes of images: `pixel_values` of shape (B, 3, H, W)."""
        images = [read_image(read_place(place)) for place in places]
        if seed is not None and self._augmentation.is_on:
            images = [
                augment(image, self._augmentation, seed=seed, row_id=row_id)
                for image, row_id in zip(images, ids, strict=True)
            ]
        # Arrays, whose channels are last whatever library the processor works with.
        arrays = [np.array(image) for image in images]
        found: Mapping[str, torch.Tensor] = self._processor(
            images=arrays, return_tensors="pt", input_data_format="channels_last"
        )
        return dict(found)

"""Images with a mask as inputs of a row: both are brought to the one size of the model."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from lora_cli.config.media import SemanticSegmentationConfig
from lora_cli.data.augmentation import Augmentation, augment
from lora_cli.data.images import describe_image, read_image, upright_size
from lora_cli.data.masks import Mask, mask_image, read_mask, resize_mask
from lora_cli.data.media import read_place
from lora_cli.tasks.contract import Batch, Features
from lora_cli.tasks.media import MediaReader
from lora_cli.tasks.rows import Columns


class MaskedImageReader(MediaReader):
    """Reads images whole, in the one size of the model, and their masks.

    Args:
        processor: Of the model.
        columns: Of the rows, by role.
        config: Of the task.
    """

    kind = "image"

    def __init__(
        self, processor: Any, columns: Columns, config: SemanticSegmentationConfig
    ) -> None:
        super().__init__(processor, columns)
        how = config.augmentation
        self._moved = Augmentation(
            crop_scale=how.crop_scale, flip=how.flip, color_jitter=0, operations=0, strength=0
        )
        self._changed = Augmentation(
            crop_scale=how.crop_scale,
            flip=how.flip,
            color_jitter=how.color_jitter,
            operations=0,
            strength=0,
        )
        self._ignored, self._zero = config.ignore_index, config.zero_is_ignored

    def describe(self, content: bytes) -> Features:
        """Return what `describe_image` does, and `size`, the width and height of the image."""
        return {**describe_image(content), "size": upright_size(content)}

    def process(
        self, places: Sequence[Mapping[str, Any]], ids: Sequence[str], *, seed: int | None
    ) -> Mapping[str, torch.Tensor]:
        """Return what the processor makes of images: `pixel_values` of shape (B, 3, H, W)."""
        images = [read_image(read_place(place)) for place in places]
        arrays = [np.array(image) for image in self._augmented(images, ids, self._changed, seed)]
        found: Mapping[str, torch.Tensor] = self._processor(
            images=arrays, return_tensors="pt", input_data_format="channels_last"
        )
        return {"pixel_values": found["pixel_values"]}

    def mask(self, content: bytes) -> Mask:
        """Return the class of each pixel; raises MediaError."""
        return read_mask(content, ignored=self._ignored, zero_is_ignored=self._zero)

    def labels(self, batch: Batch, size: tuple[int, int]) -> torch.Tensor:
        """Return masks as the model sees their images, changed alike: int64 of shape (B, H, W)."""
        images = [mask_image(self.mask(read_place(place))) for place in batch["masks"]]
        changed = self._augmented(images, batch["ids"], self._moved, batch.get("seed"))
        arrays = [np.array(resize_mask(image, size[::-1])) for image in changed]
        return torch.from_numpy(np.stack(arrays)).long()

    def _augmented(
        self, images: list[Any], ids: Sequence[str], how: Augmentation, seed: int | None
    ) -> list[Any]:
        if seed is None or not how.is_on:
            return images
        # What is cut and mirrored is drawn first, so an image and its mask have it in common.
        return [
            augment(image, how, seed=seed, row_id=row_id)
            for image, row_id in zip(images, ids, strict=True)
        ]

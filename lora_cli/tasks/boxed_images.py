"""Images with boxes: as inputs of a row, as what a model learns, and as what it says."""

import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from lora_cli.data.images import describe_image, mirror, read_image, upright_size
from lora_cli.data.media import read_place
from lora_cli.metrics.detection import MOST_BOXES, Boxes
from lora_cli.tasks.contract import Features
from lora_cli.tasks.media import MediaReader
from lora_cli.tasks.rows import Columns


class DetectionReader(MediaReader):
    """Reads images in the sizes that the processor gives them.

    Args:
        processor: Of the model.
        columns: Of the rows, by role.
        flip: Chance of mirroring an image in training.
    """

    kind = "image"

    def __init__(self, processor: Any, columns: Columns, *, flip: float) -> None:
        super().__init__(processor, columns)
        self._flip = flip

    def describe(self, content: bytes) -> Features:
        """Return what `describe_image` does, and `size`, the width and height of the image."""
        return {**describe_image(content), "size": upright_size(content)}

    def is_mirrored(self, row_id: str, seed: int | None) -> bool:
        """Whether an image is mirrored left and right at a step; never outside of training."""
        return seed is not None and random.Random(f"{seed}/{row_id}/flip").random() < self._flip

    def process(
        self, places: Sequence[Mapping[str, Any]], ids: Sequence[str], *, seed: int | None
    ) -> Mapping[str, torch.Tensor]:
        """Return what the processor makes of images of one size: `pixel_values`."""
        images = [read_image(read_place(place)) for place in places]
        arrays = [
            np.array(mirror(image) if self.is_mirrored(row_id, seed) else image)
            for image, row_id in zip(images, ids, strict=True)
        ]
        found = self._processor(
            images=arrays, return_tensors="pt", input_data_format="channels_last"
        )
        # Without padding there is nothing to be masked.
        return {"pixel_values": found["pixel_values"]}


def relative_boxes(boxes: Boxes, size: tuple[int, int]) -> dict[str, torch.Tensor]:
    """Return boxes as models of transformers learn them: `class_labels` (N,) and `boxes` (N, 4).

    The latter are centre, width and height, as shares of the image.
    """
    scale = torch.tensor([*size, *size], dtype=torch.float32)
    first, last = (torch.from_numpy(boxes.corners) / scale).split(2, dim=1)
    return {
        "class_labels": torch.from_numpy(boxes.labels),
        "boxes": torch.cat([(first + last) / 2, last - first], dim=1),
    }


def surest_boxes(
    logits_QC: torch.Tensor, boxes_Q4: torch.Tensor, size: tuple[int, int], classes: int
) -> Boxes:
    """Return the surest boxes of an image, in pixels, in order.

    Args:
        logits_QC: One more than there are classes where the last one stands for no object: each
            place then has its best class. Otherwise each class has a probability of its own.
        boxes_Q4: Centre, width and height, as shares of the image.
        size: Width and height of the image.
        classes: Number of classes.
    """
    if logits_QC.shape[1] > classes:
        scores_QC = logits_QC.softmax(-1)[:, :-1]
        scores, labels = scores_QC.max(-1)
        places = torch.arange(len(scores), device=scores.device)
    else:
        scores = logits_QC.sigmoid().flatten()
        labels = torch.arange(len(scores), device=scores.device) % classes
        places = torch.arange(len(scores), device=scores.device) // classes
    order = scores.argsort(descending=True, stable=True)[:MOST_BOXES]
    centre, sides = boxes_Q4[places[order]].split(2, dim=1)
    corners = torch.cat([centre - sides / 2, centre + sides / 2], dim=1)
    scale = torch.tensor([*size, *size], device=corners.device, dtype=corners.dtype)
    return Boxes(
        (corners * scale).cpu().numpy().astype(np.float32),
        labels[order].cpu().numpy(),
        scores[order].cpu().numpy().astype(np.float32),
    )

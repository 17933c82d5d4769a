"""Semantic segmentation: a class for each pixel of an image.

The model gives logits on a coarser grid, which are made as large as what the model reads by
bilinear interpolation. ``loss_sum = -sum_p log softmax(logits_p)[class_p]`` over the pixels p of
the masks, brought to that size by the nearest pixel, that have a class; ``count`` is their number.
Scores are counted at the size of the mask itself.

Heads that some architectures have for training alone (auxiliary heads) are left out.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from lora_cli.config.media import SemanticSegmentationConfig
from lora_cli.config.tasks import DataConfig
from lora_cli.data import made_up
from lora_cli.data.columns import resolve_label_names
from lora_cli.data.masks import classes_in, mask_png, pair_masks, read_mask
from lora_cli.data.media import (
    MediaError,
    UnreadableError,
    list_places,
    locate,
    read_media,
    read_place,
)
from lora_cli.data.sources import Loaded
from lora_cli.data.types import Row
from lora_cli.errors import Problem, UserError
from lora_cli.models.batch_norms import keep_statistics
from lora_cli.tasks.contract import Batch, Features, StepOutput
from lora_cli.tasks.images import IMAGE, ImageFamily
from lora_cli.tasks.labels import label_options, other_labels
from lora_cli.tasks.masked_images import MaskedImageReader
from lora_cli.tasks.rows import Columns, Role

MASK = Role(
    "mask",
    ("mask", "annotation", "segmentation", "segmentation_mask", "semantic_mask", "label", "labels"),
    made_up=made_up.mask,
)

# Classes whose scores are made as large as an image at a time.
_TOGETHER = 16


@dataclass(frozen=True, slots=True)
class SegmentationPrediction:
    """The classes of the pixels of one row.

    Attributes:
        id: Row id.
        counts: Pixels that are hit, predicted and there, shape (3, C); None without a mask.
        classes: The class of each pixel, shape (H, W), where there is no mask.
    """

    id: str
    counts: NDArray[np.int64] | None
    classes: NDArray[np.int32] | None


class SemanticSegmentationTask:
    """Semantic segmentation bound to a configuration, class names and a reader."""

    greater_is_better = True
    couples_rows = False

    def __init__(self, config: Any, state: Mapping[str, Any], reader: MaskedImageReader) -> None:
        self.metric: str = config.metric
        self._labels: tuple[str, ...] = tuple(state["labels"])
        self._column: str | None = state["columns"]["mask"]
        self._reader = reader

    def encode(self, row: Row) -> Features:
        """Encode a row; `mask` is the place of its mask, or None."""
        found = self._reader.encode(row)
        if self._column is None:
            return {**found, "mask": None}
        width, height = found["size"]
        place, count = read_media(
            row, self._column, "mask", lambda content: self._check(content, (height, width))
        )
        return {**found, "mask": place, "supervised": count}

    def _check(self, content: bytes, size: tuple[int, int]) -> int:
        """Return the number of pixels with a class; raises MediaError."""
        mask = self._reader.mask(content)
        if mask.shape != size:
            (high, wide), (height, width) = mask.shape, size
            raise MediaError(f"{wide} x {high} pixels for an image of {width} x {height}")
        if (most := classes_in(mask)) > len(self._labels):
            raise MediaError(f"class {most - 1}, while the last one is {len(self._labels) - 1}")
        return int((mask >= 0).sum())

    def collate(self, features: Sequence[Features]) -> Batch:
        """Put rows together: places of images, sizes (H, W), and places of `masks`, or None."""
        masks = [row["mask"] for row in features]
        return {
            "ids": [row["id"] for row in features],
            "sizes": [(row["size"][1], row["size"][0]) for row in features],
            "masks": None if None in masks else masks,
            **self._reader.collate(features),
        }

    def forward(self, model: Callable[..., Any], batch: Batch) -> StepOutput:
        """Return the summed cross-entropy, the number of pixels, and what was found.

        Outside of training that is `counts` of shape (B, 3, C), see `SegmentationPrediction`, or
        without masks `classes` of shape (B, H, W), with -1 beyond smaller images. Two forms of a
        model are compared by `logits` of shape (B, h, w, C).
        """
        keep_statistics(model)
        inputs = self._reader.inputs(batch, model)
        logits_BChw = model(**inputs).logits.float()
        outputs = self._outputs(logits_BChw, batch)
        if batch["masks"] is None:
            return StepOutput(logits_BChw.new_zeros(()), 0, outputs)
        height, width = inputs["pixel_values"].shape[-2:]
        labels_BHW = self._reader.labels(batch, (height, width)).to(logits_BChw.device)
        loss_sum, count = pixel_loss(logits_BChw, labels_BHW)
        return StepOutput(loss_sum, count, outputs)

    def _outputs(self, logits_BChw: torch.Tensor, batch: Batch) -> dict[str, torch.Tensor]:
        if batch.get("generate") is False:
            return {"logits": logits_BChw.permute(0, 2, 3, 1)}
        if "seed" in batch:
            return {}
        found = [
            best_classes(logits, size)
            for logits, size in zip(logits_BChw, batch["sizes"], strict=True)
        ]
        if batch["masks"] is None:
            high, wide = (max(sides) for sides in zip(*batch["sizes"], strict=True))
            padded = [
                functional.pad(one, (0, wide - one.shape[1], 0, high - one.shape[0]), value=-1)
                for one in found
            ]
            return {"classes": torch.stack(padded)}
        counts = []
        for one, place in zip(found, batch["masks"], strict=True):
            mask = torch.from_numpy(self._reader.mask(read_place(place))).to(one.device)
            counts.append(count_pixels(one, mask, len(self._labels)))
        return {"counts": torch.stack(counts)}

    def decode(
        self, outputs: Mapping[str, torch.Tensor], batch: Batch
    ) -> list[SegmentationPrediction]:
        """Take what was found, cut to the size of its image."""
        if "logits" in outputs:
            # Two forms of a model were compared by them.
            logits_BChw = outputs["logits"].permute(0, 3, 1, 2)
            outputs = self._outputs(logits_BChw, {**batch, "generate": True})
        if "counts" in outputs:
            counts = outputs["counts"].cpu().numpy()
            return [
                SegmentationPrediction(row_id, own, None)
                for row_id, own in zip(batch["ids"], counts, strict=True)
            ]
        classes = outputs["classes"].cpu().numpy().astype(np.int32)
        return [
            SegmentationPrediction(row_id, None, own[:high, :wide])
            for row_id, own, (high, wide) in zip(batch["ids"], classes, batch["sizes"], strict=True)
        ]

    def metrics(self, predictions: Sequence[SegmentationPrediction]) -> dict[str, float]:
        """Return mean_iou and pixel_accuracy over all pixels of all rows."""
        from lora_cli.metrics.segmentation import segmentation_metrics

        return segmentation_metrics(self._total(predictions))

    def report(self, predictions: Sequence[SegmentationPrediction]) -> dict[str, Any]:
        """Return class names, and scores by class and their averages, with the IoU."""
        from lora_cli.metrics.segmentation import segmentation_report

        return {"labels": list(self._labels), **segmentation_report(self._total(predictions))}

    def to_json(self, prediction: SegmentationPrediction) -> dict[str, Any]:
        """Return a line with the mask, as a PNG in base64, or with the pixels of each class."""
        if (classes := prediction.classes) is not None:
            shares = np.bincount(classes.ravel(), minlength=len(self._labels)) / classes.size
            named = zip(self._labels, shares.tolist(), strict=True)
            return {
                "id": prediction.id,
                "mask": mask_png(classes),
                "shares": {label: share for label, share in named if share},
            }
        parts = zip(self._labels, self._total([prediction]).T.tolist(), strict=True)
        names = ("hits", "predicted", "actual")
        pixels = {label: dict(zip(names, own, strict=True)) for label, own in parts if any(own)}
        return {"id": prediction.id, "pixels": pixels}

    def _total(self, predictions: Sequence[SegmentationPrediction]) -> NDArray[np.int64]:
        total = np.zeros((3, len(self._labels)), np.int64)
        for row in predictions:
            if row.counts is not None:
                total += row.counts
        return total


def pixel_loss(logits_BChw: torch.Tensor, labels_BHW: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Return the cross-entropy, summed over the pixels that have a class, and their number.

    Args:
        logits_BChw: Of a grid of any size.
        labels_BHW: Classes, -1 where there is none.
    """
    size = labels_BHW.shape[-2:]
    logits_BCHW = functional.interpolate(logits_BChw, size=size, mode="bilinear")
    loss_sum = functional.cross_entropy(logits_BCHW, labels_BHW, ignore_index=-1, reduction="sum")
    return loss_sum, int((labels_BHW >= 0).sum())


def best_classes(logits_Chw: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Return the most probable class of each pixel, of shape `size`.

    Some classes are interpolated at a time, so that memory does not hold scores of all of them.
    """
    best_HW = torch.full(size, -torch.inf, device=logits_Chw.device)
    found_HW = torch.zeros(size, dtype=torch.long, device=logits_Chw.device)
    for start in range(0, len(logits_Chw), _TOGETHER):
        part_1CHW = functional.interpolate(
            logits_Chw[None, start : start + _TOGETHER], size=size, mode="bilinear"
        )
        value_HW, place_HW = part_1CHW[0].max(dim=0)
        is_better = value_HW > best_HW
        best_HW = torch.where(is_better, value_HW, best_HW)
        found_HW = torch.where(is_better, place_HW + start, found_HW)
    return found_HW


def count_pixels(found_HW: torch.Tensor, mask_HW: torch.Tensor, classes: int) -> torch.Tensor:
    """Return the pixels of each class that are hit, predicted and there, of shape (3, C).

    Those that have no class, -1 in the mask, do not count.
    """
    is_known = mask_HW >= 0
    found, true = found_HW[is_known], mask_HW[is_known].long()
    parts = (found[found == true], found, true)
    return torch.stack([torch.bincount(part, minlength=classes) for part in parts])


class SemanticSegmentation(ImageFamily):
    """A row in the table of families; the state holds ``labels``, the names of the classes."""

    auto_class = "AutoModelForSemanticSegmentation"
    task_type: str | None = None
    targets = (MASK,)
    files = (IMAGE, MASK)

    def suit(
        self, data: DataConfig, loaded: Loaded, *, state: Mapping[str, Any] | None = None
    ) -> tuple[DataConfig, Loaded]:
        """Put images and masks of two folders together, then do as `MediaFamily` does."""
        paired = pair_masks(loaded.rows)
        if paired is not None:
            loaded = Loaded(rows=paired, notes=loaded.notes)
        return super().suit(data, loaded, state=state)

    def check_rows(self, rows: Sequence[Row], columns: Columns) -> list[Problem]:
        """Refuse rows whose image or mask is not there."""
        problems, column = self.input_problems(rows, columns), columns["mask"]
        faults = [] if column is None else list_places(rows, column)[1]
        return problems + (list(UnreadableError("mask", faults).problems) if faults else [])

    def learn(
        self, config: Any, train: Sequence[Row], loaded: Loaded, columns: Columns
    ) -> dict[str, Any]:
        """Return ``labels``: as given, or the numbers up to the largest one of train.

        Raises:
            UserError: If there are no two classes.
        """
        del loaded
        given = config.data.label_names
        names = list(given or ())
        if given is None:
            count = _count_classes(config, train, columns["mask"] or "")
            names = [str(number) for number in range(count)]
        labels = resolve_label_names(names, label_names=given, column_key="task.data.mask_column")
        return {"labels": list(labels)}

    def rebind(self, config: Any, state: Mapping[str, Any]) -> Mapping[str, Any]:
        """Take no other names of classes than those of training.

        Raises:
            UserError: If others are given.
        """
        names = config.data.label_names
        if names is not None and list(names) != list(state["labels"]):
            raise UserError(other_labels(names, state["labels"]))
        return state

    def describe(self, state: Mapping[str, Any]) -> str:
        """Return the number of classes."""
        return f"{len(state['labels'])} classes"

    def model_options(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Return the number and the names of the classes."""
        return label_options(state["labels"])

    def fit_model(self, model: nn.Module, state: Mapping[str, Any]) -> None:
        """Take out a head whose scores nobody sees, in place."""
        del state
        if getattr(model, "auxiliary_head", None) is not None:
            known: Any = model
            known.auxiliary_head, known.config.use_auxiliary_head = None, False

    def fit_processor(self, processor: Any, state: Mapping[str, Any]) -> Any:
        """Make all of an image the one size that the model reads, where a part was cut out."""
        del state
        cuts = getattr(processor, "do_center_crop", None) and processor.crop_size
        sides = dict(processor.crop_size if cuts else processor.size)
        side = sides.get("shortest_edge")
        processor.do_center_crop = False
        processor.size = type(processor.size)(
            height=sides.get("height", side), width=sides.get("width", side)
        )
        if getattr(processor, "keep_aspect_ratio", False):
            processor.keep_aspect_ratio = False
        return processor

    def build(
        self, config: SemanticSegmentationConfig, state: Mapping[str, Any], processor: Any
    ) -> SemanticSegmentationTask:
        """Bind the family; `processor` is an image processor."""
        reader = MaskedImageReader(processor, state["columns"], config)
        return SemanticSegmentationTask(config, state, reader)


def _count_classes(config: SemanticSegmentationConfig, rows: Sequence[Row], column: str) -> int:
    """Return the classes that masks hold; what cannot be read is reported when it is encoded."""
    most = 0
    for row in rows:
        try:
            content = read_place(locate(row.values.get(column), row.source))
            mask = read_mask(
                content, ignored=config.ignore_index, zero_is_ignored=config.zero_is_ignored
            )
        except MediaError:
            continue
        most = max(most, classes_in(mask))
    return most

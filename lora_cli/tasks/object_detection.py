"""Object detection: boxes around things in an image, each with a class.

The loss of an image is that which transformers computes for a batch of this image alone: boxes that
the model finds are matched with those that are there (Hungarian matching, Carion et al. 2020,
arXiv:2005.12872), and classes and places are compared. ``loss_sum`` is the sum over images,
``count`` their number. That is another objective than transformers' own for a batch, which divides
by the boxes of all images in it and so depends on how rows are batched; this one does not. Each
image is run by itself, in a size of its own and without padding.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.loss import loss_for_object_detection

from lora_cli import packages
from lora_cli.config.media import ObjectDetectionConfig
from lora_cli.config.tasks import DataConfig
from lora_cli.data import made_up
from lora_cli.data.boxes import coco_files, cut_box, fit_box, place_images, read_objects
from lora_cli.data.columns import sort_labels
from lora_cli.data.files import read_file
from lora_cli.data.listing import list_rows
from lora_cli.data.media import MediaError, UnreadableError, media_name
from lora_cli.data.sources import KEY, Loaded, find_path
from lora_cli.data.types import Row
from lora_cli.errors import Problem, UserError
from lora_cli.metrics.detection import Boxes
from lora_cli.models.batch_norms import keep_statistics
from lora_cli.tasks.boxed_images import DetectionReader, relative_boxes, surest_boxes
from lora_cli.tasks.contract import Batch, Features, StepOutput
from lora_cli.tasks.images import ImageFamily
from lora_cli.tasks.labels import LabelFamily, indices_of
from lora_cli.tasks.rows import Columns, Role

# What the loss of transformers asks before it looks for other processes.
_HAS_OTHERS = "is_accelerate_available"

OBJECTS = Role("objects", ("objects", "annotations", "boxes"), made_up=made_up.objects)


@dataclass(frozen=True, slots=True)
class DetectionPrediction:
    """What was found in one row.

    Attributes:
        id: Row id.
        found: The surest boxes first.
        reference: Boxes that are there, or None where they are not known.
    """

    id: str
    found: Boxes
    reference: Boxes | None


class ObjectDetectionTask:
    """Object detection bound to a configuration, class names and a reader."""

    greater_is_better = True
    couples_rows = False

    def __init__(self, config: Any, state: Mapping[str, Any], reader: DetectionReader) -> None:
        self.metric: str = config.metric
        self._labels: tuple[str, ...] = tuple(state["labels"])
        self._indices = indices_of(state)
        self._column: str | None = state["columns"]["objects"]
        self._has_corners = config.box_format == "corners"
        self._cuts = config.unfit_boxes == "cut"
        self._threshold: float = config.threshold
        self._reader = reader

    def encode(self, row: Row) -> Features:
        """Encode a row; `boxes` are corners and classes, or None.

        Raises:
            UnreadableError: If the image cannot be read, or a box is not inside of it.
        """
        found = self._reader.encode(row)
        if self._column is None:
            return {**found, "boxes": None}
        fit, corners, labels = cut_box if self._cuts else fit_box, [], []
        for box, label in read_objects(row.values[self._column]):
            try:
                fitted = fit(box, found["size"], has_corners=self._has_corners)
            except MediaError as error:
                name = media_name(row, self._reader.column)
                raise UnreadableError("box", [(name, str(error))]) from error
            if fitted is not None:
                corners.append(fitted)
                labels.append(self._indices[label])
        return {**found, "boxes": [corners, labels], "supervised": len(labels)}

    def collate(self, features: Sequence[Features]) -> Batch:
        """Put rows together: places, `sizes` (W, H) of images, and `boxes`, or None."""
        boxes = [row["boxes"] for row in features]
        return {
            "ids": [row["id"] for row in features],
            "sizes": [tuple(row["size"]) for row in features],
            "boxes": None if None in boxes else [_boxes(*own) for own in boxes],
            **self._reader.collate(features),
        }

    def forward(self, model: Callable[..., Any], batch: Batch) -> StepOutput:
        """Return the summed loss, the number of images, and `logits` and `pred_boxes`.

        Logits have shape (B, Q, C), or (B, Q, C + 1) where the last one stands for no object;
        boxes (B, Q, 4) are centre, width and height, as shares of the image.
        """
        keep_statistics(model)
        found = [self._run(model, batch, row) for row in range(len(batch["ids"]))]
        outputs = {
            name: torch.cat([getattr(one, name).float() for one in found])
            for name in ("logits", "pred_boxes")
        }
        losses = [one.loss for one in found if getattr(one, "loss", None) is not None]
        if len(losses) < len(found):
            return StepOutput(outputs["logits"].new_zeros(()), 0, outputs)
        return StepOutput(torch.stack(losses).float().sum(), len(losses), outputs)

    def _run(self, model: Callable[..., Any], batch: Batch, row: int) -> Any:
        """Run one image of a batch."""
        own = {name: batch[name][row : row + 1] for name in ("places", "ids")}
        inputs = self._reader.inputs({**own, "seed": batch.get("seed")}, model)
        if batch["boxes"] is None:
            return model(**inputs)
        target = relative_boxes(batch["boxes"][row], batch["sizes"][row])
        if self._reader.is_mirrored(batch["ids"][row], batch.get("seed")):
            target["boxes"][:, 0] = 1 - target["boxes"][:, 0]
        device = inputs["pixel_values"].device
        with counting_alone():
            return model(**inputs, labels=[{name: x.to(device) for name, x in target.items()}])

    def decode(
        self, outputs: Mapping[str, torch.Tensor], batch: Batch
    ) -> list[DetectionPrediction]:
        """Take the surest boxes of each image."""
        count = len(self._labels)
        true = batch["boxes"] or [None] * len(batch["ids"])
        logits_BQC, boxes_BQ4 = (outputs[name].detach() for name in ("logits", "pred_boxes"))
        rows = zip(logits_BQC, boxes_BQ4, batch["sizes"], strict=True)
        return [
            DetectionPrediction(row_id, surest_boxes(logits, boxes, size, count), reference)
            for row_id, (logits, boxes, size), reference in zip(
                batch["ids"], rows, true, strict=True
            )
        ]

    def metrics(self, predictions: Sequence[DetectionPrediction]) -> dict[str, float]:
        """Return map and map_50."""
        from lora_cli.metrics.detection import detection_metrics

        scores: dict[str, float] = detection_metrics(*_pairs(predictions), len(self._labels))
        return scores

    def report(self, predictions: Sequence[DetectionPrediction]) -> dict[str, Any]:
        """Return class names, and the average precision of each class."""
        from lora_cli.metrics.detection import detection_report

        found = detection_report(*_pairs(predictions), len(self._labels))
        return {"labels": list(self._labels), **found}

    def to_json(self, prediction: DetectionPrediction) -> dict[str, Any]:
        """Return a line of boxes: the sure ones, or all of them beside those that are there."""
        least = self._threshold if prediction.reference is None else 0.0
        line = {"id": prediction.id, "boxes": self._listed(prediction.found, least)}
        if prediction.reference is not None:
            line["reference"] = self._listed(prediction.reference, 0.0)
        return line

    def _listed(self, boxes: Boxes, least: float) -> list[dict[str, Any]]:
        parts = zip(boxes.sides, boxes.labels.tolist(), boxes.scores.tolist(), strict=True)
        return [
            {"bbox": box, "label": self._labels[label], "score": score}
            for box, label, score in parts
            if score >= least
        ]


def _boxes(corners: Sequence[Sequence[float]], labels: Sequence[int]) -> Boxes:
    """Return the boxes that are there in an image."""
    return Boxes(
        np.array(corners, np.float32).reshape(-1, 4),
        np.array(labels, np.int64),
        np.ones(len(labels), np.float32),
    )


@contextmanager
def counting_alone() -> Iterator[None]:
    """Let the loss of transformers count the boxes of this process alone.

    It would add up those of all processes, and wait for each of them at each image.
    """
    kept = getattr(loss_for_object_detection, _HAS_OTHERS)
    setattr(loss_for_object_detection, _HAS_OTHERS, lambda: False)
    try:
        yield
    finally:
        setattr(loss_for_object_detection, _HAS_OTHERS, kept)


def _pairs(predictions: Sequence[DetectionPrediction]) -> tuple[list[Boxes], list[Boxes]]:
    """Return found and true boxes of the rows whose boxes are known."""
    known = [(row.found, row.reference) for row in predictions if row.reference is not None]
    return [found for found, _ in known], [true for _, true in known]


class ObjectDetection(ImageFamily, LabelFamily):
    """A row in the table of families."""

    auto_class = "AutoModelForObjectDetection"
    task_type: str | None = None
    targets = (OBJECTS,)

    def find(self, data: DataConfig, *, file_split: str = "train") -> Loaded:
        """Read the rows, or files of COCO.

        Raises:
            UserError: If the extra is not installed, or as `load_rows`.
        """
        for module in ("scipy", "pycocotools"):
            packages.check_extra(module, extra="detection", needed_by="Object detection")
        path = find_path(data.path) if data.path else None
        files = coco_files(path) if isinstance(path, Path) and path.is_dir() else {}
        if not files:
            loaded = super().find(data, file_split=file_split)
        else:
            rows = {split: read_file(file, key=KEY) for split, file in files.items()}
            loaded = Loaded(rows=rows)
        placed = {split: place_images(rows) for split, rows in loaded.rows.items()}
        return Loaded(placed, loaded.class_names, loaded.notes)

    def check_rows(self, rows: Sequence[Row], columns: Columns) -> list[Problem]:
        """Refuse rows whose image is not there, or whose objects are no boxes."""
        problems, column = self.input_problems(rows, columns), columns["objects"]
        if column is None:
            return problems
        bad = []
        for row in rows:
            try:
                read_objects(row.values.get(column))
            except ValueError as error:
                bad.append((row, str(error)))
        return problems + ([_bad_objects(bad, column)] if bad else [])

    def labels_of(self, value: Any) -> tuple[str, ...]:
        """Return the category of each object."""
        return tuple(label for _, label in read_objects(value))

    def learn(
        self, config: Any, train: Sequence[Row], loaded: Loaded, columns: Columns
    ) -> dict[str, Any]:
        """Return ``labels`` and ``numbered``; one class is enough.

        Raises:
            UserError: If train has no objects.
        """
        del loaded
        given = config.data.label_names
        found = {label for labels in self.all_labels(train, columns) for label in labels}
        if not found:
            raise UserError(_no_objects())
        return {"labels": list(given or sort_labels(found)), "numbered": given is not None}

    def build(
        self, config: ObjectDetectionConfig, state: Mapping[str, Any], processor: Any
    ) -> ObjectDetectionTask:
        """Bind the family; `processor` is an image processor."""
        flip = config.augmentation.flip
        reader = DetectionReader(processor, state["columns"], flip=flip)
        return ObjectDetectionTask(config, state, reader)


def _bad_objects(bad: Sequence[tuple[Row, str]], column: str) -> Problem:
    finding = f"is {bad[0][1]} in 1 row" if len(bad) == 1 else f"is not in {len(bad)} rows"
    return Problem(
        id="data.bad-objects",
        message=f"`{column}` must hold the boxes and categories of each row, but {finding}.",
        where=list_rows(bad),
        allowed='{"bbox": [[left, top, width, height], ...], "category": [...]}, or a list of '
        "objects with bbox and category",
        fix="correct these rows; a row without objects has empty lists",
    )


def _no_objects() -> Problem:
    return Problem(
        id="data.no-objects",
        message="`train` must have boxes to learn from, but all of its rows are without objects.",
        key="task.data.objects_column",
        fix="check task.data.objects_column and task.data.train_split",
    )

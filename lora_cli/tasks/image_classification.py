"""Image classification: one label for each image, or any number of labels.

The head is that of transformers for images; `lora_cli.tasks.single_label` and
`lora_cli.tasks.multi_label` have the losses.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lora_cli.config.media import ImageClassificationConfig, ImageMultiLabelConfig
from lora_cli.data.images import thumbnail
from lora_cli.data.media import Place, read_place
from lora_cli.tasks.contract import Batch
from lora_cli.tasks.images import ImageFamily, ImageReader
from lora_cli.tasks.multi_label import LABELS, MultiLabelFamily, MultiLabelTask
from lora_cli.tasks.single_label import LabelPrediction, SingleLabelFamily, SingleLabelTask
from lora_cli.tasks.texts import LABEL

_PLACES = 5
_PICTURES = 24


@dataclass(frozen=True, slots=True)
class ImagePrediction(LabelPrediction):
    """The label of one image.

    Attributes:
        place: Where its file is, see `lora_cli.data.media`.
    """

    place: Place


class ImageClassificationTask(SingleLabelTask):
    """Image classification bound to a configuration, label names and a reader."""

    def decode(self, outputs: Mapping[str, torch.Tensor], batch: Batch) -> list[Any]:
        """Turn logits into labels and probabilities, each with the place of its image."""
        return [
            ImagePrediction(row.id, row.label, row.probabilities, row.reference, place)
            for row, place in zip(super().decode(outputs, batch), batch["places"], strict=True)
        ]

    def report(self, predictions: Sequence[Any]) -> dict[str, Any]:
        """Return what `SingleLabelTask.report` does, and `pictures` of the surest wrong rows."""
        wrong = [row for row in predictions if row.reference not in (None, row.label)]
        wrong.sort(key=lambda row: -row.probabilities[row.label])
        pictures = [
            (
                thumbnail(read_place(row.place)),
                f"{row.id}: {self._labels[row.reference]}, taken for "
                f"{self._labels[row.label]} ({100 * row.probabilities[row.label]:.0f} %)",
            )
            for row in wrong[:_PICTURES]
        ]
        return {**super().report(predictions), "pictures": pictures}

    def metrics(self, predictions: Sequence[LabelPrediction]) -> dict[str, float]:
        """Return accuracy, top5_accuracy and macro_f1."""
        found = super().metrics(predictions)
        known = [row for row in predictions if row.reference is not None]
        return {
            "accuracy": found["accuracy"],
            "top5_accuracy": sum(map(_is_near, known)) / len(known) if known else 0.0,
            "macro_f1": found["macro_f1"],
        }


def _is_near(row: LabelPrediction) -> bool:
    """Whether the true label is among the five most probable; of equal ones the first count."""
    places = sorted(range(len(row.probabilities)), key=lambda place: -row.probabilities[place])
    return row.reference in places[:_PLACES]


class ImageClassification(ImageFamily, SingleLabelFamily):
    """A row in the table of families: one label an image."""

    auto_class = "AutoModelForImageClassification"
    task_type: str | None = None
    targets = (LABEL,)

    def build(
        self, config: ImageClassificationConfig, state: Mapping[str, Any], processor: Any
    ) -> ImageClassificationTask:
        """Bind the family; `processor` is an image processor."""
        reader = ImageReader(processor, state["columns"], augmentation=config.augmentation)
        return ImageClassificationTask(config, state, reader)


class ImageMultiLabel(ImageFamily, MultiLabelFamily):
    """A row in the table of families: any number of labels an image."""

    auto_class = "AutoModelForImageClassification"
    task_type: str | None = None
    targets = (LABELS,)

    def build(
        self, config: ImageMultiLabelConfig, state: Mapping[str, Any], processor: Any
    ) -> MultiLabelTask:
        """Bind the family; `processor` is an image processor."""
        reader = ImageReader(processor, state["columns"], augmentation=config.augmentation)
        return MultiLabelTask(config, state, reader)

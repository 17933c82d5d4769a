"""Image classification: one label for each image, or any number of labels.

The head is that of transformers for images; `lora_cli.tasks.single_label` and
`lora_cli.tasks.multi_label` have the losses.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from lora_cli.config.media import ImageClassificationConfig, ImageMultiLabelConfig
from lora_cli.tasks.images import ImageFamily, ImageReader
from lora_cli.tasks.multi_label import LABELS, MultiLabelFamily, MultiLabelTask
from lora_cli.tasks.single_label import LabelPrediction, SingleLabelFamily, SingleLabelTask
from lora_cli.tasks.texts import LABEL

_PLACES = 5


class ImageClassificationTask(SingleLabelTask):
    """Image classification bound to a configuration, label names and a reader."""

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

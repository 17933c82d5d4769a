"""Settings of the task families whose rows have images."""

from dataclasses import dataclass, field
from typing import Literal

from lora_cli.config.tasks import TaskSection


@dataclass(frozen=True, kw_only=True, slots=True)
class AugmentationConfig:
    """Random changes of images in training; evaluation and predictions see them as they are."""

    crop_scale: float = field(default=0.5, metadata={"above": 0, "max": 1})
    """Least share of the area that a random crop keeps, at sides of 3:4 to 4:3; 1 does not crop."""

    flip: float = field(default=0.5, metadata={"min": 0, "max": 1})
    """Chance of mirroring left and right; 0 where direction matters, as in writing."""

    color_jitter: float = field(default=0.2, metadata={"min": 0, "max": 1})
    """Brightness, contrast and saturation are each changed by up to this share; 0 does not."""

    rand_augment: int = field(default=0, metadata={"min": 0, "max": 14})
    """Operations of RandAugment on each image (arXiv:1909.13719), such as 2; 0 is off."""

    rand_augment_strength: int = field(default=9, metadata={"min": 0, "max": 30})
    """How strong these operations are, from 0 to 30."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _ImageConfig(TaskSection):
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageClassificationConfig(_ImageConfig):
    """One label for each image."""

    family: Literal["image_classification"] = "image_classification"

    class_weights: Literal["none", "balanced"] = "none"
    """balanced weighs each label in the loss by N / (C n), for C labels with n of N rows each."""

    metric: Literal["accuracy", "top5_accuracy", "macro_f1"] = "accuracy"
    """Metric that selects the best checkpoint; all of them are reported."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageMultiLabelConfig(_ImageConfig):
    """Any number of labels for each image."""

    family: Literal["image_multi_label"] = "image_multi_label"

    threshold: float = field(default=0.5, metadata={"above": 0, "below": 1})
    """A label is given where its probability is at least this."""

    class_weights: Literal["none", "balanced"] = "none"
    """balanced weighs rows that have a label by (N - n) / n, where n of N rows have it."""

    metric: Literal["micro_f1", "macro_f1", "exact_match"] = "micro_f1"
    """Metric that selects the best checkpoint; all of them are reported."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskAugmentationConfig:
    """Random changes of images in training; masks are cut and mirrored with their images."""

    crop_scale: float = field(default=0.5, metadata={"above": 0, "max": 1})
    """Least share of the area that a random crop keeps, at sides of 3:4 to 4:3; 1 does not crop."""

    flip: float = field(default=0.5, metadata={"min": 0, "max": 1})
    """Chance of mirroring left and right; 0 where direction matters, as in writing."""

    color_jitter: float = field(default=0.2, metadata={"min": 0, "max": 1})
    """Brightness, contrast and saturation are each changed by up to this share; 0 does not."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SemanticSegmentationConfig(TaskSection):
    """A class for each pixel of an image."""

    family: Literal["semantic_segmentation"] = "semantic_segmentation"

    ignore_index: int = field(default=255, metadata={"min": 0, "max": 65535})
    """Number of pixels that have no class: they are neither learned nor counted."""

    zero_is_ignored: bool = False
    """Whether 0 is no class, and 1 the first one, as in ADE20K."""

    augmentation: MaskAugmentationConfig = field(default_factory=MaskAugmentationConfig)

    metric: Literal["mean_iou", "pixel_accuracy"] = "mean_iou"
    """Metric that selects the best checkpoint; both are reported."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BoxAugmentationConfig:
    """Random changes of images in training, with their boxes."""

    flip: float = field(default=0.5, metadata={"min": 0, "max": 1})
    """Chance of mirroring left and right; 0 where direction matters, as in writing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectDetectionConfig(TaskSection):
    """Boxes around things in an image, each with a class."""

    family: Literal["object_detection"] = "object_detection"

    box_format: Literal["sides", "corners"] = "sides"
    """sides: left, top, width, height (COCO); corners: left, top, right, bottom; in pixels."""

    unfit_boxes: Literal["refuse", "cut"] = "refuse"
    """What to do with boxes over the edge, and empty ones: cut cuts them, and leaves these out."""

    threshold: float = field(default=0.5, metadata={"min": 0, "below": 1})
    """Boxes that predict writes are at least so sure; all of them count in evaluations."""

    augmentation: BoxAugmentationConfig = field(default_factory=BoxAugmentationConfig)

    metric: Literal["map", "map_50"] = "map"
    """Metric that selects the best checkpoint: average precision at .5 to .95, or .5 overlap."""

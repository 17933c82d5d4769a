"""Settings of the task families whose rows have images."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from lora_cli.config.tasks import TaskSection
from lora_cli.errors import Problem

PROMPT = "a photo of a {}"
"""What stands for a label in zero-shot classification, unless the user says otherwise."""


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
class ZeroShotConfig:
    """Labels that images are given without training on labels, each told by a text."""

    labels: tuple[str, ...] | None = field(default=None, metadata={"text": True})
    """Labels to choose from, such as [cat,dog]; null gives none, or those of training."""

    prompt: str | None = field(default=None, metadata={"text": True})
    """Text of a label, which takes the place of {}; null: a photo of a {}, or that of training."""


def check_zero_shot(config: ZeroShotConfig, *, section: str) -> Iterator[Problem]:
    """Report labels that cannot be chosen from, and a prompt with no place for a label.

    Args:
        config: What is to be done.
        section: Where the settings are: "task.zero_shot" or "zero_shot".
    """
    labels, prompt = config.labels, config.prompt
    if labels is not None and (len(set(labels)) < max(2, len(labels)) or "" in labels):
        yield Problem(
            id="config.bad-value",
            message=f"`{section}.labels` must be two or more different labels, but is "
            f"[{', '.join(labels)}].",
            key=f"{section}.labels",
            fix=f"{section}.labels=[cat,dog]",
        )
    if prompt is not None and prompt.count("{}") != 1:
        yield Problem(
            id="config.bad-value",
            message=f'`{section}.prompt` must have one {{}} for the label, but is "{prompt}".',
            key=f"{section}.prompt",
            fix=f'{section}.prompt="{PROMPT}"',
        )


def _kept_in_sight() -> AugmentationConfig:
    """Return changes after which a caption is still true: little is cut off, nothing mirrored."""
    return AugmentationConfig(crop_scale=0.9, flip=0.0, color_jitter=0.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageTextContrastiveConfig(TaskSection):
    """Which caption belongs to which image: a dual encoder of both, such as CLIP or SigLIP."""

    family: Literal["image_text_contrastive"] = "image_text_contrastive"

    max_length: int = field(default=64, metadata={"min": 4})
    """Tokens to keep of each caption; SigLIP is given exactly so many, and was trained with 64."""

    augmentation: AugmentationConfig = field(default_factory=_kept_in_sight)

    zero_shot: ZeroShotConfig = field(default_factory=ZeroShotConfig)

    metric: Literal[
        "mean_recall",
        "image_to_text_recall_at_1",
        "image_to_text_recall_at_5",
        "image_to_text_recall_at_10",
        "text_to_image_recall_at_1",
        "text_to_image_recall_at_5",
        "text_to_image_recall_at_10",
    ] = "mean_recall"
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

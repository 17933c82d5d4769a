from collections.abc import Callable
from typing import Any

import pytest

from lora_cli.config.media import AugmentationConfig, ZeroShotConfig, check_zero_shot
from lora_cli.errors import UserError

BASE = ("train", "model=vit", "task=image_classification", "task.data.path=x")


def test_images_are_changed_unless_told_otherwise(compose_all: Callable[..., Any]) -> None:
    (composed,) = compose_all(*BASE, "task.augmentation.flip=0")
    found = composed.config.task.augmentation
    assert found == AugmentationConfig(flip=0)
    assert (found.crop_scale, found.rand_augment) == (0.5, 0)


@pytest.mark.parametrize(
    "setting",
    ["crop_scale=0", "crop_scale=1.1", "flip=2", "color_jitter=-1", "rand_augment_strength=31"],
)
def test_values_out_of_range(compose_all: Callable[..., Any], setting: str) -> None:
    with pytest.raises(UserError, match=f"task.augmentation.{setting.partition('=')[0]}"):
        compose_all(*BASE, f"task.augmentation.{setting}")


@pytest.mark.parametrize("setting", ["task.max_length=64", "task.data.text_column=text"])
def test_what_texts_have_is_refused(compose_all: Callable[..., Any], setting: str) -> None:
    with pytest.raises(UserError):
        compose_all(*BASE, setting)


def test_a_named_set_keeps_writing_as_it_is(compose_all: Callable[..., Any]) -> None:
    (composed,) = compose_all("train", "model=dinov2-small", "task=mnist")
    assert composed.config.task.augmentation.flip == 0
    assert composed.config.task.data.image_column == "image"


CAPTIONED = ("train", "model=clip-base", "task=image_text_contrastive", "task.data.path=x")


def test_captions_stay_true_of_images_in_training(compose_all: Callable[..., Any]) -> None:
    (composed,) = compose_all(*CAPTIONED)
    task = composed.config.task
    assert (task.augmentation.flip, task.augmentation.color_jitter) == (0, 0)
    assert task.zero_shot == ZeroShotConfig()
    (composed,) = compose_all("train", "model=siglip-base", "task=rsicd")
    assert composed.config.task.data.caption_column == "captions"


@pytest.mark.parametrize(
    ("config", "keys"),
    [
        (ZeroShotConfig(), []),
        (ZeroShotConfig(labels=("a", "b"), prompt="{}"), []),
        (ZeroShotConfig(labels=("a",)), ["labels"]),
        (ZeroShotConfig(labels=("a", "a")), ["labels"]),
        (ZeroShotConfig(labels=("a", "")), ["labels"]),
        (ZeroShotConfig(prompt="a photo"), ["prompt"]),
        (ZeroShotConfig(labels=(), prompt="{} or {}"), ["labels", "prompt"]),
    ],
)
def test_labels_to_choose_from(config: ZeroShotConfig, keys: list[str]) -> None:
    found = list(check_zero_shot(config, section="zero_shot"))
    assert [problem.key for problem in found] == [f"zero_shot.{key}" for key in keys]

"""Random changes of images: what is drawn, and what may come of it."""

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from lora_cli.data.augmentation import (
    OPERATIONS,
    Augmentation,
    augment,
    jitter,
    rand_augment,
    random_crop,
)

NONE = Augmentation(crop_scale=1, flip=0, color_jitter=0, operations=0, strength=9)
ALL = Augmentation(crop_scale=0.3, flip=0.5, color_jitter=0.3, operations=2, strength=15)
DOTS = Image.frombytes("RGB", (32, 24), random.Random(0).randbytes(3 * 32 * 24))


def same(first: Any, second: Any) -> bool:
    return first.size == second.size and first.tobytes() == second.tobytes()


def test_nothing_changes_where_nothing_is_on() -> None:
    assert not NONE.is_on
    assert same(augment(DOTS, NONE, seed=1, row_id="a"), DOTS)
    for name, value in (("crop_scale", 0.9), ("flip", 0.1), ("color_jitter", 0.1)):
        assert replace(NONE, **{name: value}).is_on
    assert replace(NONE, operations=1).is_on


def test_seed_and_row_decide_alone() -> None:
    first = augment(DOTS, ALL, seed=1, row_id="a")
    random.seed(99)
    assert same(augment(DOTS, ALL, seed=1, row_id="a"), first)
    assert not same(augment(DOTS, ALL, seed=2, row_id="a"), first)
    assert not same(augment(DOTS, ALL, seed=1, row_id="b"), first)


def test_a_flip_is_a_mirror_image_half_of_the_time() -> None:
    how, mirrored = replace(NONE, flip=0.5), ImageOps.mirror(DOTS)
    found = [augment(DOTS, how, seed=seed, row_id="a") for seed in range(200)]
    assert all(same(image, DOTS) or same(image, mirrored) for image in found)
    assert 70 < sum(same(image, mirrored) for image in found) < 130
    assert same(augment(DOTS, replace(NONE, flip=1), seed=0, row_id="a"), mirrored)


def test_crops_keep_their_share_of_the_area_and_their_form() -> None:
    draw = random.Random(3)
    shares, ratios = [], []
    for _ in range(300):
        width, height = random_crop(DOTS, draw, least=0.25).size
        shares.append(width * height / (32 * 24))
        ratios.append(width / height)
    assert min(shares) > 0.2
    assert min(shares) < 0.35
    assert max(shares) <= 1
    assert 0.68 < min(ratios) < max(ratios) < 1.5


def test_a_crop_that_fits_nowhere_leaves_the_image_whole() -> None:
    line = Image.new("RGB", (200, 1))
    assert same(random_crop(line, random.Random(0), least=0.9), line)


def test_colours_stay_near_their_own() -> None:
    grey = Image.new("RGB", (4, 4), (100, 100, 100))
    found = [np.asarray(jitter(grey, random.Random(n), by=0.2)).mean() for n in range(50)]
    assert 75 < min(found) < 95 < 105 < max(found) < 125
    assert same(jitter(grey, random.Random(0), by=0.0), grey)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("sign", [-1, 1])
def test_every_operation_keeps_size_and_mode(operation: Any, sign: int) -> None:
    for share in (0.0, 0.5, 1.0):
        found = operation(DOTS, share, sign)
        assert (found.size, found.mode) == (DOTS.size, "RGB")


def test_rand_augment_draws_among_all_operations() -> None:
    found = {
        rand_augment(DOTS, random.Random(n), operations=1, strength=30).tobytes()
        for n in range(200)
    }
    # Two directions for some, the image itself for one.
    assert len(found) > len(OPERATIONS)

"""Random changes of sounds: as strong as asked, and the same for a row and step."""

import random

import numpy as np
import pytest
from tiny_sounds import tone

from lora_cli.data.sound_augmentation import (
    SoundAugmentation,
    add_noise,
    augment_sound,
    draw_place,
)

OFF = SoundAugmentation(gain=0, noise=0, noise_snr=15)


def test_nothing_is_changed_unless_asked() -> None:
    samples = tone(440, 0.2)
    assert augment_sound(samples, OFF, seed=1, row_id="a") is samples


def test_gain_is_in_decibels() -> None:
    samples, how = tone(440, 0.2), SoundAugmentation(gain=6, noise=0, noise_snr=15)
    factors = [
        float(augment_sound(samples, how, seed=seed, row_id="a")[5] / samples[5])
        for seed in range(200)
    ]
    decibels = 20 * np.log10(factors)
    assert -6 <= decibels.min() < -5
    assert 5 < decibels.max() <= 6


@pytest.mark.parametrize("ratio", [0, 20])
def test_noise_has_the_power_asked_for(ratio: float) -> None:
    samples = tone(440, 2)
    noise = add_noise(samples, random.Random(0), ratio=ratio) - samples
    measured = 10 * np.log10(np.mean(samples**2) / np.mean(noise**2))
    assert measured == pytest.approx(ratio, abs=0.1)
    assert noise.dtype == np.float32


def test_noise_is_as_frequent_as_asked() -> None:
    samples, how = tone(440, 0.01), SoundAugmentation(gain=0, noise=0.3, noise_snr=15)
    changed = sum(
        augment_sound(samples, how, seed=seed, row_id="a") is not samples for seed in range(500)
    )
    assert 110 < changed < 190


def test_draws_follow_from_step_and_row() -> None:
    samples, how = tone(440, 0.1), SoundAugmentation(gain=6, noise=1, noise_snr=15)
    first = augment_sound(samples, how, seed=1, row_id="a")
    assert np.array_equal(first, augment_sound(samples, how, seed=1, row_id="a"))
    assert not np.array_equal(first, augment_sound(samples, how, seed=2, row_id="a"))
    assert not np.array_equal(first, augment_sound(samples, how, seed=1, row_id="b"))
    places = {draw_place(seed=seed, row_id="a") for seed in range(20)}
    assert len(places) == 20
    assert all(0 <= place <= 1 for place in places)

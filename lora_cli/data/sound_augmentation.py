"""Changes of sounds for training: which part is heard, how loud, and noise.

What is drawn for a row is a function of the seed of the step and of the id of the row, as in
`lora_cli.data.augmentation`.
"""

import random
from dataclasses import dataclass

import numpy as np

from lora_cli.data.sounds import Wave

# The ratio of signal to noise is drawn from the least one and this much more, in decibels.
_RANGE = 20.0


@dataclass(frozen=True, kw_only=True, slots=True)
class SoundAugmentation:
    """What may be changed.

    Attributes:
        gain: Decibels by which a sound may become louder or softer; 0 leaves it.
        noise: Chance of adding white noise.
        noise_snr: Least ratio of signal to noise in decibels.
    """

    gain: float
    noise: float
    noise_snr: float


def draw_place(*, seed: int, row_id: str) -> float:
    """Return where to cut a sound that is too long, from 0, its start, to 1, its end."""
    return random.Random(f"{seed}/{row_id}/cut").random()


def augment_sound(samples: Wave, how: SoundAugmentation, *, seed: int, row_id: str) -> Wave:
    """Return a changed sound.

    Args:
        samples: Of shape (T,).
        how: What may be changed.
        seed: Of the step.
        row_id: Of the row.
    """
    draw = random.Random(f"{seed}/{row_id}/augment")
    if how.gain > 0:
        samples = samples * np.float32(10 ** (draw.uniform(-how.gain, how.gain) / 20))
    if draw.random() < how.noise:
        samples = add_noise(samples, draw, ratio=how.noise_snr + draw.uniform(0, _RANGE))
    return samples


def add_noise(samples: Wave, draw: random.Random, *, ratio: float) -> Wave:
    """Add white noise of ``power(samples) / 10 ** (ratio / 10)``, power being the mean square."""
    noise = np.random.default_rng(draw.getrandbits(64)).standard_normal(len(samples), np.float32)
    power = float(np.mean(np.square(samples, dtype=np.float64)))
    return samples + noise * np.float32((power / 10 ** (ratio / 10)) ** 0.5)

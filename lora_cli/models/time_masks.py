"""Masks over time that speech models draw for themselves in training (SpecAugment).

wav2vec 2.0, HuBERT and WavLM hide parts of the sound from their layers where their configuration
says so (arXiv:2006.11477, section 4.2). transformers draws them from numpy's global state, which no
seed of a run decides, and stops at sounds shorter than one mask.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np


@contextmanager
def seeded_masks(
    model: Any, *, seed: int | None, ids: Sequence[str], samples: int
) -> Iterator[None]:
    """Let a model draw its masks by the seed of the step and the rows, and none on short sounds.

    Args:
        model: In training or not; one that draws no masks is left alone.
        seed: Of the step; None outside of training.
        ids: Of the rows of the batch.
        samples: Of its longest row; not read where a model has a window.
    """
    config: Any = getattr(model, "config", None)
    if seed is None or not getattr(config, "apply_spec_augment", False):
        yield
        return
    stride = getattr(config, "inputs_to_logits_ratio", None)
    # The last frames need more samples than one stride; Whisper's are those of its window.
    frames = math.inf if stride is None else samples // stride - 1
    before = np.random.get_state()
    digest = hashlib.sha256("/".join([str(seed), *ids]).encode()).digest()
    np.random.seed(int.from_bytes(digest[:4], "little"))
    config.apply_spec_augment = frames > config.mask_time_length
    try:
        yield
    finally:
        config.apply_spec_augment = True
        np.random.set_state(before)

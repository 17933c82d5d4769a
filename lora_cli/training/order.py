"""Which rows an optimizer step trains on: a pure function of seed, step and data size.

Nothing is drawn while training, so a resumed run sees the rows that the uninterrupted one would
have seen, and the order does not depend on micro-batches or on the number of processes.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import TypeVar

import numpy as np

from lora_cli.config.sections import TrainerConfig

Item = TypeVar("Item")


@lru_cache(maxsize=2)
def epoch_order(num_rows: int, *, seed: int, epoch: int) -> tuple[int, ...]:
    """Return a permutation of ``range(num_rows)`` that depends on nothing but the arguments."""
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch])))
    return tuple(generator.permutation(num_rows).tolist())


def steps_per_epoch(num_rows: int, *, global_batch_size: int) -> int:
    """Return the optimizer steps of one pass: the last one takes the rows that are left."""
    return -(-num_rows // global_batch_size)


def total_steps(config: TrainerConfig, num_rows: int) -> int:
    """Return the optimizer steps of a whole run over `num_rows` training rows."""
    per_epoch = steps_per_epoch(num_rows, global_batch_size=config.global_batch_size)
    return config.max_steps or config.epochs * per_epoch


def step_rows(
    num_rows: int, *, seed: int, global_batch_size: int, step: int
) -> tuple[int, tuple[int, ...]]:
    """Return the epoch and the row indices of optimizer step `step`, counted from 0."""
    epoch, index = divmod(step, steps_per_epoch(num_rows, global_batch_size=global_batch_size))
    order = epoch_order(num_rows, seed=seed, epoch=epoch)
    return epoch, order[index * global_batch_size : (index + 1) * global_batch_size]


def cut_by_length(
    items: Sequence[Item], lengths: Sequence[int], *, size: int
) -> list[tuple[Item, ...]]:
    """Cut items into batches of at most `size`, those of like length together, longest first.

    Rows of one optimizer step may be put into micro-batches in any way, since the loss is summed
    over all of them; sorting by length leaves the gradient as it is and saves padding.
    """
    ranked = sorted(range(len(items)), key=lambda index: (-lengths[index], index))
    return [
        tuple(items[index] for index in ranked[start : start + size])
        for start in range(0, len(ranked), size)
    ]

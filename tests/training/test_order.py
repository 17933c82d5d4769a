from collections import Counter

from lora_cli.config.sections import TrainerConfig
from lora_cli.training.order import (
    cut_by_length,
    epoch_order,
    step_rows,
    steps_per_epoch,
    total_steps,
)


def test_an_epoch_is_a_permutation_that_depends_on_its_arguments_alone() -> None:
    first = epoch_order(50, seed=3, epoch=0)
    assert sorted(first) == list(range(50))
    epoch_order.cache_clear()
    assert epoch_order(50, seed=3, epoch=0) == first
    assert epoch_order(50, seed=3, epoch=1) != first
    assert epoch_order(50, seed=4, epoch=0) != first


def test_order_is_the_same_on_every_machine_and_in_every_release() -> None:
    # Written down once: a change here means that no older run can be resumed or repeated.
    assert epoch_order(10, seed=42, epoch=0) == STORED


STORED = (5, 6, 0, 7, 3, 2, 4, 9, 1, 8)


def test_steps_cover_every_row_once_an_epoch() -> None:
    for rows in (1, 7, 8, 9, 33):
        for batch in (1, 4, 8):
            steps = steps_per_epoch(rows, global_batch_size=batch)
            for epoch in (0, 1):
                seen: Counter[int] = Counter()
                for step in range(epoch * steps, (epoch + 1) * steps):
                    at, indices = step_rows(rows, seed=0, global_batch_size=batch, step=step)
                    assert at == epoch
                    assert 1 <= len(indices) <= batch
                    seen.update(indices)
                assert seen == Counter(range(rows))


def test_batches_of_like_length_keep_every_item() -> None:
    lengths = [3, 9, 1, 9, 4, 7, 2]
    batches = cut_by_length("abcdefg", lengths, size=3)
    assert batches == [("b", "d", "f"), ("e", "a", "g"), ("c",)]


def test_the_length_of_a_run() -> None:
    assert total_steps(TrainerConfig(epochs=3, global_batch_size=8), 17) == 9
    assert total_steps(TrainerConfig(epochs=3, global_batch_size=8, max_steps=4), 17) == 4

import pytest
import torch

from lora_cli.training.events import Progress
from lora_cli.training.selection import judge, tensors_sha256


@pytest.mark.parametrize("greater", [True, False])
def test_best_and_patience_over_a_run(greater: bool) -> None:
    sign = 1 if greater else -1
    progress, seen = Progress(), []
    for step, value in enumerate([0.9, 0.5, 0.4, 0.55, 0.75, 0.75]):
        moved = Progress(
            step=step,
            best_metric=progress.best_metric,
            best_step=progress.best_step,
            evaluations_without_improvement=progress.evaluations_without_improvement,
        )
        progress, is_best = judge(moved, sign * value, greater_is_better=greater, threshold=0.1)
        seen.append((is_best, progress.best_step, progress.evaluations_without_improvement))
    # Step 0 never counts; 0.55 is the best, though too little better than 0.5 for patience.
    assert seen == [
        (False, None, 0),
        (True, 1, 0),
        (False, 1, 1),
        (True, 3, 2),
        (True, 4, 0),
        (False, 4, 1),
    ]


def test_a_hash_of_tensors_sees_names_types_shapes_and_every_value() -> None:
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.zeros(2, dtype=torch.bfloat16)}
    known = tensors_sha256(tensors)
    assert tensors_sha256(dict(reversed(tensors.items()))) == known
    changed = [
        {**tensors, "a": tensors["a"].view(3, 2)},
        {**tensors, "a": tensors["a"].int()},
        {**tensors, "b": torch.tensor([0.0, -0.0], dtype=torch.bfloat16)},
        {"c": tensors["a"], "b": tensors["b"]},
        {"a": tensors["a"]},
    ]
    assert len({known, *map(tensors_sha256, changed)}) == 6
    assert tensors_sha256({"x": torch.tensor(1.0)}) != tensors_sha256({"x": torch.tensor(2.0)})

import math

import pytest
import torch
from torch import nn

from lora_cli.errors import RunFailedError
from lora_cli.training.gradients import (
    add_penalty,
    check_finite,
    check_weights,
    clip_gradients,
    scale_gradients,
)


def parameters() -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [
        nn.Parameter(torch.randn(3, 2)),
        nn.Parameter(torch.randn(2)),
        nn.Parameter(torch.ones(1)),
    ]


def loss(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a @ b).square().sum()


def test_a_penalty_is_added_once_to_the_mean_loss() -> None:
    """Sums over micro-batches, scaled and with a penalty, against autograd of the whole."""
    a, b, unused = parameters()
    for part in (1.0, 2.0):
        (part * loss(a, b)).backward()
    scale_gradients([a, b, unused], 1 / 4)
    add_penalty([a, b, unused], 0.7 * a.norm() + unused.exp().sum())
    twin_a, twin_b, other = parameters()
    (3 * loss(twin_a, twin_b) / 4 + 0.7 * twin_a.norm() + other.exp().sum()).backward()
    for found, expected in ((a, twin_a), (b, twin_b), (unused, other)):
        torch.testing.assert_close(found.grad, expected.grad)


def test_a_penalty_leaves_other_gradients_alone() -> None:
    a, b, unused = parameters()
    loss(a, b).backward()
    assert b.grad is not None
    before = b.grad.clone()
    add_penalty([a, b, unused], a.norm())
    assert torch.equal(b.grad, before)
    assert unused.grad is None


@pytest.mark.parametrize("limit", [None, 0.5, 1e6])
def test_clipping_equals_torch(limit: float | None) -> None:
    ours, theirs = parameters(), parameters()
    for a, b, _ in (ours, theirs):
        loss(a, b).backward()
    expected = nn.utils.clip_grad_norm_(theirs, math.inf if limit is None else limit)
    assert clip_gradients(ours, limit) == float(expected)
    for found, parameter in zip(ours, theirs, strict=True):
        assert (found.grad is None) == (parameter.grad is None)
        if found.grad is not None:
            assert torch.equal(found.grad, parameter.grad)


@pytest.mark.parametrize(
    ("loss_sum", "norm", "scale", "what"),
    [
        (math.nan, 1.0, None, "loss"),
        (math.inf, 1.0, (2.0, 0), "loss"),
        (1.0, math.inf, None, "gradient"),
        (1.0, math.nan, None, "gradient"),
        (1.0, math.inf, (2.0, 0), None),
        (1.0, math.nan, (1.0, 0), "gradient"),
        (1.0, 1.0, (0.5, 0), None),
        (1.0, 1.0, None, None),
    ],
)
def test_only_finite_steps_go_on(
    loss_sum: float, norm: float, scale: tuple[float, int] | None, what: str | None
) -> None:
    ids = [f"row-{number}" for number in range(12)]
    if what is None:
        check_finite(loss_sum, norm, step=3, ids=ids, loss_scale=scale)
        return
    with pytest.raises(RunFailedError, match=f"The {what} must be finite, but is not at step 3"):
        check_finite(loss_sum, norm, step=3, ids=ids, loss_scale=scale)


def test_the_rows_of_a_bad_step_are_named() -> None:
    with pytest.raises(RunFailedError) as caught:
        check_finite(math.nan, 1.0, step=1, ids=list(range(12)))
    assert caught.value.problems[0].where == "rows with id 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 2 more"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_named(value: float) -> None:
    tensors = {"a": torch.ones(2), "b/step": torch.tensor(3), "c": torch.ones(2, dtype=torch.uint8)}
    check_weights(tensors, step=4)
    bad = {"d": torch.tensor([1.0, value]), "e": torch.tensor(value)}
    with pytest.raises(RunFailedError, match="not after step 4") as caught:
        check_weights({**tensors, **bad}, step=4)
    assert caught.value.problems[0].where == "d and 1 more"

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lora_cli.config.optim import AdamWConfig, ScheduleFreeConfig
from lora_cli.errors import UserError
from lora_cli.training.averages import Averages, build_averages
from lora_cli.training.optim import build_optimizer


def walk(ema_decay: float | None, optimizer: Any = None) -> tuple[Averages, nn.Parameter, Any]:
    """Return averages over a weight, the weight, and the steps that it is to take."""
    weight = nn.Parameter(torch.zeros(2, 3))
    built = build_optimizer(optimizer or AdamWConfig(), {"w": weight})
    averages = build_averages(ema_decay, optimizer=built, parameters={"w": weight})
    return averages, weight, np.random.default_rng(0).normal(size=(30, 2, 3))


@pytest.mark.parametrize("decay", [0.5, 0.9999])
def test_the_moving_average_equals_plain_algebra(decay: float) -> None:
    averages, weight, steps = walk(decay)
    expected = np.zeros((2, 3))
    for number, value in enumerate(steps, start=1):
        weight.data.copy_(torch.from_numpy(value))
        averages.after_step(number)
        kept = min(decay, (1 + number) / (10 + number))
        expected = kept * expected + (1 - kept) * value
    with averages.applied():
        np.testing.assert_allclose(weight.detach().numpy(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(weight.detach(), torch.from_numpy(steps[-1]).float())


def test_an_error_meanwhile_puts_the_weights_back() -> None:
    averages, weight, _ = walk(0.5)
    weight.data.fill_(3.0)

    def fail() -> None:
        with averages.applied():
            assert not weight.any()
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        fail()
    assert bool((weight == 3.0).all())


def test_a_state_continues_bit_equal() -> None:
    whole, weight, steps = walk(0.9)
    half, other, _ = walk(0.9)
    for number, value in enumerate(steps, start=1):
        weight.data.copy_(torch.from_numpy(value))
        whole.after_step(number)
        if number == 10:
            left = half.load_state({**whole.state(), "w/exp_avg": torch.ones(1)})
            assert list(left) == ["w/exp_avg"]
        if number > 10:
            other.data.copy_(torch.from_numpy(value))
            half.after_step(number)
    assert torch.equal(half.state()["w/ema"], whole.state()["w/ema"])


def test_a_state_without_an_average_is_refused() -> None:
    averages, _, _ = walk(0.9)
    with pytest.raises(UserError, match='lacks "w/ema"'):
        averages.load_state({"w/exp_avg": torch.ones(2, 3)})


def test_without_averages_the_weights_are_evaluated() -> None:
    averages, weight, _ = walk(None)
    weight.data.fill_(2.0)
    averages.after_step(1)
    with averages.applied():
        assert bool((weight == 2.0).all())
    state = {"w/exp_avg": torch.ones(1)}
    assert (averages.state(), averages.load_state(state)) == ({}, state)


def test_looking_at_schedule_free_averages_changes_nothing() -> None:
    config = ScheduleFreeConfig(lr=0.1)
    found = []
    for looks in (0, 3):
        weight = nn.Parameter(torch.linspace(-1, 1, 6).reshape(2, 3))
        optimizer = build_optimizer(config, {"w": weight})
        averages = build_averages(None, optimizer=optimizer, parameters={"w": weight})
        for step in range(8):
            weight.grad = torch.cos(weight.detach() * (step + 1))
            optimizer.step()
            averages.after_step(step + 1)
            for _ in range(looks):
                before = weight.detach().clone()
                with averages.applied():
                    assert not torch.equal(weight, before) or step == 0
        found.append(weight.detach())
    assert torch.equal(*found)

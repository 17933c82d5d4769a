from typing import Any

import pytest
import torch
from torch import nn

from lora_cli.config.optim import AdamWConfig, SgdConfig
from lora_cli.training.descent import Descent
from lora_cli.training.events import Progress, TrainState
from lora_cli.training.runtime import Runtime


def build(config: Any = None, **options: Any) -> tuple[Descent, nn.Parameter, Runtime]:
    weight = nn.Parameter(torch.ones(2, 2))
    runtime = Runtime(precision="float32")
    settings = {"runtime": runtime, "ema_decay": None, **options}
    return Descent(config or SgdConfig(momentum=0.0), {"w": weight}, **settings), weight, runtime


def test_a_step_is_the_rate_times_the_gradient() -> None:
    descent, weight, _ = build()
    weight.grad = torch.full((2, 2), 3.0)
    assert descent.step(0.1)
    torch.testing.assert_close(weight.detach(), torch.full((2, 2), 0.7))
    descent.clear()
    assert weight.grad is None


def test_a_step_that_changes_nothing_is_said_to_be_none(monkeypatch: pytest.MonkeyPatch) -> None:
    descent, weight, runtime = build()
    weight.grad = torch.ones(2, 2)
    assert not descent.step(0.0)
    monkeypatch.setattr(runtime, "was_skipped", lambda _: True)
    assert not descent.step(0.1)


def test_moments_averages_and_loss_scale_continue() -> None:
    config = AdamWConfig(lr=0.1)
    first, weight, runtime = build(config, ema_decay=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    runtime._accelerator.scaler = scaler
    for step in (1, 2):
        weight.grad = torch.full((2, 2), float(step))
        first.step(0.1)
        first.average(step)
    scaler.load_state_dict({**scaler.state_dict(), "scale": 32.0, "_growth_tracker": 7})
    progress = first.noted(Progress(step=2))
    assert (progress.loss_scale, progress.loss_scale_steps) == (32.0, 7)
    state = first.state()
    assert set(state) == {"w/exp_avg", "w/exp_avg_sq", "w/step", "w/ema"}

    second, other, runtime = build(config, ema_decay=0.9)
    other.data.copy_(weight.data)
    runtime._accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    second.resume(TrainState(progress, {}, state))
    assert second.noted(Progress(step=2)) == progress
    for descent, parameter in ((first, weight), (second, other)):
        parameter.grad = torch.full((2, 2), 3.0)
        descent.step(0.1)
        descent.average(3)
    assert torch.equal(weight, other)
    assert torch.equal(first.state()["w/ema"], second.state()["w/ema"])
    with first.averaged():
        assert torch.equal(weight.detach(), first.state()["w/ema"])


def test_without_a_scaler_there_is_no_scale() -> None:
    descent, _, _ = build()
    assert descent.noted(Progress(step=1)) == Progress(step=1)

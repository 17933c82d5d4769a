import math
from dataclasses import replace

import pytest
import torch
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
    get_polynomial_decay_schedule_with_warmup,
)

from lora_cli.config.optim import ConstantConfig, CosineConfig, LinearConfig, PolynomialConfig
from lora_cli.training.schedule import lr_factor, warmup_steps

TOTAL = 40


def _theirs(kind: str, warmup: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = {
        "linear": lambda: get_linear_schedule_with_warmup(optimizer, warmup, TOTAL),
        "cosine": lambda: get_cosine_schedule_with_warmup(optimizer, warmup, TOTAL),
        "constant": lambda: get_constant_schedule_with_warmup(optimizer, warmup),
        "polynomial": lambda: get_polynomial_decay_schedule_with_warmup(
            optimizer, warmup, TOTAL, lr_end=0.0, power=3.0
        ),
    }[kind]()
    values = []
    for _ in range(TOTAL):
        values.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return values


@pytest.mark.parametrize("warmup", [0, 7])
@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("linear", LinearConfig()),
        ("cosine", CosineConfig()),
        ("constant", ConstantConfig()),
        ("polynomial", PolynomialConfig(power=3.0)),
    ],
)
def test_the_fall_is_that_of_transformers(kind: str, config: LinearConfig, warmup: int) -> None:
    """The climb before it is not: theirs begins with a step that learns nothing."""
    config = replace(config, warmup_steps=warmup)
    ours = [lr_factor(config, step=step, total_steps=TOTAL) for step in range(warmup, TOTAL)]
    assert ours == pytest.approx(_theirs(kind, warmup)[warmup:], abs=1e-12)


def test_warmup_climbs_evenly_to_the_peak_and_never_starts_at_zero() -> None:
    config = LinearConfig(warmup_steps=4)
    assert [lr_factor(config, step=step, total_steps=10) for step in range(5)] == pytest.approx(
        [0.2, 0.4, 0.6, 0.8, 1.0]
    )


@pytest.mark.parametrize(
    ("config", "total", "steps"),
    [
        (LinearConfig(warmup_ratio=0.06), 100, 6),
        (LinearConfig(warmup_ratio=0.06), 10, 1),
        (LinearConfig(warmup_ratio=0.0), 10, 0),
        (LinearConfig(warmup_steps=7, warmup_ratio=0.5), 100, 7),
        (LinearConfig(warmup_steps=7), 3, 3),
    ],
)
def test_warmup_length(config: LinearConfig, total: int, steps: int) -> None:
    assert warmup_steps(config, total_steps=total) == steps


def test_no_division_by_zero_when_all_steps_warm_up() -> None:
    config = CosineConfig(warmup_ratio=1.0)
    values = [lr_factor(config, step=step, total_steps=3) for step in range(3)]
    assert all(math.isfinite(value) and 0 < value <= 1 for value in values)

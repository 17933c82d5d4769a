"""Learning-rate schedules as pure functions of the step; there is no scheduler state to save."""

import math
from collections.abc import Callable

from lora_cli.config.optim import (
    ConstantConfig,
    CosineConfig,
    LinearConfig,
    PolynomialConfig,
    SchedulerConfig,
)


def warmup_steps(config: SchedulerConfig, *, total_steps: int) -> int:
    """Return the number of steps that climb to the peak."""
    if config.warmup_steps is not None:
        return min(config.warmup_steps, total_steps)
    return math.ceil(config.warmup_ratio * total_steps)


def lr_factor(config: SchedulerConfig, *, step: int, total_steps: int) -> float:
    """Return what the peak learning rate is multiplied by at optimizer step `step`, from 0.

    During warm-up of w steps the factor is ``(step + 1) / (w + 1)``, so that the first step
    already learns. After it, with ``p = (step - w) / (total_steps - w)`` in [0, 1):
    linear ``1 - p``, cosine ``(1 + cos(pi p)) / 2``, constant ``1``, polynomial ``(1 - p)**power``.
    """
    warmup = warmup_steps(config, total_steps=total_steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, total_steps - warmup)
    return _decay(config)(progress)


def _decay(config: SchedulerConfig) -> Callable[[float], float]:
    match config:
        case LinearConfig():
            return lambda progress: 1 - progress
        case CosineConfig():
            return lambda progress: (1 + math.cos(math.pi * progress)) / 2
        case ConstantConfig():
            return lambda _: 1.0
        case PolynomialConfig(power=power):
            return lambda progress: float((1 - progress) ** power)

"""Settings of optimizers and learning-rate schedules; one dataclass for each choice."""

from dataclasses import dataclass, field
from typing import Any, Literal

from lora_cli.config.strategies import LR_FACTOR


def _lr_field(default: float) -> Any:
    """A learning rate that suits low-rank updates; the other strategies take a multiple of it."""
    return field(default=default, metadata={"above": 0, "times": ("strategy.name", LR_FACTOR)})


def _lora_plus_field() -> Any:
    """LoRA+ has a meaning only where there is a B to train."""
    only = {
        "strategy.name": ("lora", "lora_then_full"),
        "lora.variant": ("lora", "dora", "lora_fa", "adalora"),
    }
    return field(default=1.0, metadata={"above": 0, "only": only})


def _decay_field(*variants: str) -> Any:
    """Weight decay of one factor of the low-rank updates; no meaning where it is not trained."""
    only = {"strategy.name": ("lora", "lora_then_full"), "lora.variant": variants}
    return field(default=None, metadata={"min": 0, "only": only})


def _decay_a_field() -> Any:
    return _decay_field("lora", "dora", "adalora")


def _decay_b_field() -> Any:
    return _decay_field("lora", "dora", "lora_fa", "adalora")


@dataclass(frozen=True, kw_only=True, slots=True)
class AdamWConfig:
    """AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101)."""

    name: Literal["adamw"] = "adamw"
    """Optimizer."""

    lr: float = _lr_field(2e-3)
    """Peak learning rate."""

    weight_decay: float = field(default=0.0, metadata={"min": 0})
    """Decoupled weight decay of matrices; biases and norms have none."""

    weight_decay_a: float | None = _decay_a_field()
    """Weight decay of every A instead; null takes weight_decay."""

    weight_decay_b: float | None = _decay_b_field()
    """Weight decay of every B instead; null takes weight_decay."""

    betas: tuple[float, float] = field(default=(0.9, 0.999), metadata={"min": 0, "below": 1})
    """Decay of the running means of the gradient and of its square."""

    eps: float = field(default=1e-8, metadata={"above": 0})
    """Added to the denominator."""

    lora_plus_ratio: float = _lora_plus_field()
    """Learning rate of every B is this times lr (LoRA+, Hayou et al. 2024, arXiv:2402.12354)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SgdConfig:
    """Stochastic gradient descent with momentum."""

    name: Literal["sgd"] = "sgd"
    """Optimizer."""

    lr: float = _lr_field(0.1)
    """Peak learning rate."""

    weight_decay: float = field(default=0.0, metadata={"min": 0})
    """Weight decay of matrices; biases and norms have none."""

    weight_decay_a: float | None = _decay_a_field()
    """Weight decay of every A instead; null takes weight_decay."""

    weight_decay_b: float | None = _decay_b_field()
    """Weight decay of every B instead; null takes weight_decay."""

    momentum: float = field(default=0.9, metadata={"min": 0, "below": 1})
    """Share of the last update that is kept."""

    lora_plus_ratio: float = _lora_plus_field()
    """Learning rate of every B is this times lr (LoRA+, Hayou et al. 2024, arXiv:2402.12354)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AdafactorConfig:
    """Adafactor (Shazeer and Stern 2018, arXiv:1804.04235): factored second moments."""

    name: Literal["adafactor"] = "adafactor"
    """Optimizer."""

    lr: float = _lr_field(1e-2)
    """Peak learning rate, relative to the root mean square of each parameter."""

    weight_decay: float = field(default=0.0, metadata={"min": 0})
    """Weight decay of matrices; biases and norms have none."""

    weight_decay_a: float | None = _decay_a_field()
    """Weight decay of every A instead; null takes weight_decay."""

    weight_decay_b: float | None = _decay_b_field()
    """Weight decay of every B instead; null takes weight_decay."""

    lora_plus_ratio: float = _lora_plus_field()
    """Learning rate of every B is this times lr (LoRA+, Hayou et al. 2024, arXiv:2402.12354)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LionConfig:
    """Lion (Chen et al. 2023, arXiv:2302.06675): steps by the sign of a mean of the gradient."""

    name: Literal["lion"] = "lion"
    """Optimizer."""

    lr: float = _lr_field(2e-4)
    """Peak learning rate; a third to a tenth of that of AdamW."""

    weight_decay: float = field(default=0.0, metadata={"min": 0})
    """Decoupled weight decay of matrices; biases and norms have none."""

    weight_decay_a: float | None = _decay_a_field()
    """Weight decay of every A instead; null takes weight_decay."""

    weight_decay_b: float | None = _decay_b_field()
    """Weight decay of every B instead; null takes weight_decay."""

    betas: tuple[float, float] = field(default=(0.9, 0.99), metadata={"min": 0, "below": 1})
    """Share of the mean in the step, and decay of the mean."""

    lora_plus_ratio: float = _lora_plus_field()
    """Learning rate of every B is this times lr (LoRA+, Hayou et al. 2024, arXiv:2402.12354)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleFreeConfig:
    """Schedule-free AdamW (Defazio et al. 2024, arXiv:2405.15682): averages, and no schedule."""

    name: Literal["schedule_free"] = "schedule_free"
    """Optimizer."""

    lr: float = _lr_field(2e-3)
    """Learning rate after the warm-up, to the end."""

    weight_decay: float = field(default=0.0, metadata={"min": 0})
    """Decoupled weight decay of matrices; biases and norms have none."""

    weight_decay_a: float | None = _decay_a_field()
    """Weight decay of every A instead; null takes weight_decay."""

    weight_decay_b: float | None = _decay_b_field()
    """Weight decay of every B instead; null takes weight_decay."""

    betas: tuple[float, float] = field(default=(0.9, 0.999), metadata={"above": 0, "below": 1})
    """Share of the average where gradients are taken; decay of the mean of the squared gradient."""

    eps: float = field(default=1e-8, metadata={"above": 0})
    """Added to the denominator."""

    lora_plus_ratio: float = _lora_plus_field()
    """Learning rate of every B is this times lr (LoRA+, Hayou et al. 2024, arXiv:2402.12354)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AdamW8BitConfig:
    """AdamW with moments in 8 bits (Dettmers et al. 2021, arXiv:2110.02861), by bitsandbytes."""

    name: Literal["adamw_8bit"] = "adamw_8bit"
    """Optimizer."""

    lr: float = _lr_field(2e-3)
    """Peak learning rate."""

    weight_decay: float = field(default=0.0, metadata={"min": 0})
    """Decoupled weight decay of matrices; biases and norms have none."""

    weight_decay_a: float | None = _decay_a_field()
    """Weight decay of every A instead; null takes weight_decay."""

    weight_decay_b: float | None = _decay_b_field()
    """Weight decay of every B instead; null takes weight_decay."""

    betas: tuple[float, float] = field(default=(0.9, 0.999), metadata={"min": 0, "below": 1})
    """Decay of the running means of the gradient and of its square."""

    eps: float = field(default=1e-8, metadata={"above": 0})
    """Added to the denominator."""

    min_size: int = field(default=4096, metadata={"min": 1})
    """Tensors with fewer numbers than this keep moments in 32 bits."""

    lora_plus_ratio: float = _lora_plus_field()
    """Learning rate of every B is this times lr (LoRA+, Hayou et al. 2024, arXiv:2402.12354)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearConfig:
    """Warm up, then fall in a straight line to zero at the last step."""

    name: Literal["linear"] = "linear"
    """Shape of the learning rate over the run."""

    warmup_steps: int | None = field(default=None, metadata={"min": 0})
    """Steps from zero up to the peak; used instead of warmup_ratio when given."""

    warmup_ratio: float = field(default=0.06, metadata={"min": 0, "max": 1})
    """Share of all steps used to warm up."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CosineConfig:
    """Warm up, then fall along half a cosine to zero at the last step."""

    name: Literal["cosine"] = "cosine"
    """Shape of the learning rate over the run."""

    warmup_steps: int | None = field(default=None, metadata={"min": 0})
    """Steps from zero up to the peak; used instead of warmup_ratio when given."""

    warmup_ratio: float = field(default=0.06, metadata={"min": 0, "max": 1})
    """Share of all steps used to warm up."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ConstantConfig:
    """Warm up, then stay at the peak."""

    name: Literal["constant"] = "constant"
    """Shape of the learning rate over the run."""

    warmup_steps: int | None = field(default=None, metadata={"min": 0})
    """Steps from zero up to the peak; used instead of warmup_ratio when given."""

    warmup_ratio: float = field(default=0.0, metadata={"min": 0, "max": 1})
    """Share of all steps used to warm up."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PolynomialConfig:
    """Warm up, then fall as (1 - progress) ** power to zero at the last step."""

    name: Literal["polynomial"] = "polynomial"
    """Shape of the learning rate over the run."""

    warmup_steps: int | None = field(default=None, metadata={"min": 0})
    """Steps from zero up to the peak; used instead of warmup_ratio when given."""

    warmup_ratio: float = field(default=0.06, metadata={"min": 0, "max": 1})
    """Share of all steps used to warm up."""

    power: float = field(default=2.0, metadata={"above": 0})
    """Exponent of the fall; 1 is linear."""


OptimizerConfig = (
    AdamWConfig | SgdConfig | AdafactorConfig | LionConfig | ScheduleFreeConfig | AdamW8BitConfig
)
SchedulerConfig = LinearConfig | CosineConfig | ConstantConfig | PolynomialConfig

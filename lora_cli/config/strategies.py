"""Settings of what is trained: one dataclass for each choice of `strategy`."""

from dataclasses import dataclass, field
from typing import Literal

# What a learning rate that the user leaves to us is multiplied by: the defaults of the optimizers
# suit low-rank updates. Ratios, rounded, of the best rate that benchmarks/variants.py finds for a
# strategy to that of LoRA (docs/lora.md): one small encoder and one task.
LR_FACTOR: dict[str, float] = {
    "lora": 1,
    "full": 0.025,
    "head": 10,
    "top": 0.1,
    "bitfit": 1,
    "lora_then_full": 1,
    "adapter": 0.5,
    "prefix": 5,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraStrategyConfig:
    """Train low-rank updates and the head (Hu et al. 2021, arXiv:2106.09685)."""

    name: Literal["lora"] = "lora"
    """What is trained."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FullStrategyConfig:
    """Train every weight."""

    name: Literal["full"] = "full"
    """What is trained."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadStrategyConfig:
    """Train the head, and other newly initialised modules, only."""

    name: Literal["head"] = "head"
    """What is trained."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TopStrategyConfig:
    """Train the last blocks and the head."""

    name: Literal["top"] = "top"
    """What is trained."""

    layers: int = field(default=2, metadata={"min": 1})
    """Number of blocks to train, counted from the last."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BitFitStrategyConfig:
    """Train the biases and the head (BitFit, Ben Zaken et al. 2021, arXiv:2106.10199)."""

    name: Literal["bitfit"] = "bitfit"
    """What is trained."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraThenFullStrategyConfig:
    """Train low-rank updates, merge them, then train every weight."""

    name: Literal["lora_then_full"] = "lora_then_full"
    """What is trained."""

    full_lr: float = field(default=2e-5, metadata={"above": 0})
    """Peak learning rate of the second phase; the default suits AdamW."""

    full_epochs: int = field(default=1, metadata={"min": 1})
    """Passes over the rows in the second phase, whatever ends the first (trainer.max_steps)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterStrategyConfig:
    """Train small bottleneck layers and the head (Houlsby et al. 2019, arXiv:1902.00751)."""

    name: Literal["adapter"] = "adapter"
    """What is trained."""

    size: int = field(default=64, metadata={"min": 1})
    """Width of the bottleneck."""

    placement: Literal["houlsby", "pfeiffer"] = "pfeiffer"
    """After attention and feed-forward part of a block (houlsby), or after the latter only."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefixStrategyConfig:
    """Train keys and values put before every attention (Li and Liang 2021, arXiv:2101.00190)."""

    name: Literal["prefix"] = "prefix"
    """What is trained."""

    num_tokens: int = field(default=20, metadata={"min": 1})
    """Length of the prefix."""


StrategyConfig = (
    LoraStrategyConfig
    | FullStrategyConfig
    | HeadStrategyConfig
    | TopStrategyConfig
    | BitFitStrategyConfig
    | LoraThenFullStrategyConfig
    | AdapterStrategyConfig
    | PrefixStrategyConfig
)

"""How large the updates are and of which variant; what an adapter file says about itself."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from lora_cli.lora.patterns import matches


@dataclass(frozen=True, kw_only=True, slots=True)
class AdaLoraSettings:
    """How AdaLoRA (Zhang et al. 2023, arXiv:2303.10512) moves ranks, in optimizer steps.

    Attributes:
        init_r: Rank of every layer at the start.
        total_steps: Steps of the whole run.
        warmup_steps: Steps before the first rank is taken away.
        final_steps: Steps at the end during which the ranks stay as they are.
        every: Ranks are taken away each time that so many steps are done.
        beta1: Decay of the running mean of importance.
        beta2: Decay of the running mean of how much importance changes.
        orthogonal: Weight of the penalty that keeps the factors orthogonal.

    Raises:
        ValueError: If no step is left between warm-up and end.
    """

    init_r: int
    total_steps: int
    warmup_steps: int = 0
    final_steps: int = 0
    every: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orthogonal: float = 0.5

    def __post_init__(self) -> None:
        if self.warmup_steps >= self.total_steps - self.final_steps:
            raise ValueError(
                "Warm-up and end must leave at least one step to take ranks away in, but are "
                f"{self.warmup_steps} and {self.final_steps} of {self.total_steps}."
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraSettings:
    """Everything about an adapter but which layers it is in.

    Attributes:
        r: Rank of an update; with AdaLoRA the average rank at the end.
        alpha: Strength of an update before it is divided.
        dropout: Chance of zeroing an input element of the update, in training only.
        variant: "lora", "dora", "lora_fa", "adalora" or "vera".
        rslora: Divide `alpha` by the square root of the rank instead of the rank
            (Kalajdzievski 2023, arXiv:2312.03732).
        init: Start of A and B: "kaiming", "gaussian", "pissa", "olora" or "eva".
        pissa_niter: Iterations of the randomized singular value decomposition of PiSSA; None
            decomposes exactly.
        lora_bias: Whether B has a trained bias.
        bias: Which biases of the base are trained: "none", "lora_only" (of adapted layers), "all".
        rank_pattern: Ranks of layers that a pattern selects; the first that matches counts.
        alpha_pattern: Likewise for `alpha`.
        d_initial: VeRA's start of the scaling vector d.
        projection_seed: Decides VeRA's shared random matrices.
        projection_sizes: Columns of VeRA's A and rows of its B, as read from a file; None takes
            the largest layer's.
        adalora: Of variant "adalora" alone.
    """

    r: int
    alpha: float
    dropout: float = 0.0
    variant: str = "lora"
    rslora: bool = False
    init: str = "kaiming"
    pissa_niter: int | None = None
    lora_bias: bool = False
    bias: str = "none"
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    d_initial: float = 0.1
    projection_seed: int = 0
    projection_sizes: tuple[int, int] | None = None
    adalora: AdaLoraSettings | None = None

    def r_of(self, name: str) -> int:
        """Return the rank of the update of the layer at path `name`."""
        found = (r for pattern, r in self.rank_pattern.items() if matches(pattern, name))
        return next(found, self.r)

    def alpha_of(self, name: str) -> float:
        """Return the strength of the update of the layer at path `name`."""
        found = (alpha for pattern, alpha in self.alpha_pattern.items() if matches(pattern, name))
        return next(found, self.alpha)


def scale_of(r: int, alpha: float, *, rslora: bool) -> float:
    """Return the factor of an update: ``alpha / r``, or ``alpha / sqrt(r)`` with rsLoRA.

    >>> scale_of(4, 8.0, rslora=False), scale_of(4, 8.0, rslora=True)
    (2.0, 4.0)
    """
    return alpha / (math.sqrt(r) if rslora else r)

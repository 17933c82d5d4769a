"""Settings of the adapter: which layers get one, how large it is, how it starts and is trained."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

_WITH_FACTORS = {"lora.variant": ("lora", "dora", "lora_fa")}
_NOT_VERA = {"lora.variant": ("lora", "dora", "lora_fa", "adalora")}


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaConfig:
    """EVA (Paischer et al. 2024, arXiv:2410.07170): A starts from what the layers are given."""

    rows: int = field(default=256, metadata={"min": 1})
    """Training rows to look at before the first step."""

    rho: float = field(default=2.0, metadata={"min": 1})
    """Largest rank of a layer is rho * r, where the inputs need it; 1 keeps every rank at r."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AdaLoraConfig:
    """AdaLoRA (Zhang et al. 2023, arXiv:2303.10512): ranks move to the layers that need them."""

    init_r: int | None = field(default=None, metadata={"min": 1})
    """Rank of every layer at the start; null takes 1.5 r. r is the average rank at the end."""

    warmup_ratio: float = field(default=0.1, metadata={"min": 0, "below": 1})
    """Share of all steps before the first rank is taken away."""

    final_ratio: float = field(default=0.3, metadata={"min": 0, "below": 1})
    """Share of all steps at the end during which the ranks stay as they are."""

    every: int = field(default=10, metadata={"min": 1})
    """Take ranks away every so many optimizer steps."""

    beta1: float = field(default=0.85, metadata={"above": 0, "below": 1})
    """Decay of the running mean of a weight's importance."""

    beta2: float = field(default=0.85, metadata={"above": 0, "below": 1})
    """Decay of the running mean of how much that importance changes."""

    orthogonal: float = field(default=0.5, metadata={"min": 0})
    """Weight of the part of the loss that keeps the rows of A and columns of B orthogonal."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VeraConfig:
    """VeRA (Kopiczko et al. 2023, arXiv:2310.11454): random shared factors, trained scales."""

    d_initial: float = field(default=0.1, metadata={"above": 0})
    """Start of the trained scale between the two shared factors."""

    seed: int = field(default=0, metadata={"min": 0, "max": 2**32 - 1})
    """Decides the shared factors, which are stored with the adapter."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraConfig:
    """Which layers get an adapter, and how large it is."""

    variant: Literal["lora", "dora", "lora_fa", "adalora", "vera"] = "lora"
    """Form of the update, from arXiv 2106.09685, 2402.09353, 2308.03303, 2303.10512, 2310.11454."""

    r: int = field(default=8, metadata={"min": 1})
    """Rank of the update. Memory and file size grow in proportion."""

    alpha: float = field(default=16.0, metadata={"above": 0, "only": _NOT_VERA})
    """Strength of the update: it is multiplied by alpha / r."""

    dropout: float = field(default=0.0, metadata={"min": 0, "below": 1})
    """Chance of zeroing an input element of the update, in training only."""

    rslora: bool = field(default=False, metadata={"only": _WITH_FACTORS})
    """Multiply by alpha / sqrt(r) instead, for large r (rsLoRA, arXiv:2312.03732)."""

    init: Literal["kaiming", "gaussian", "pissa", "olora", "eva"] = field(
        default="kaiming", metadata={"only": _WITH_FACTORS}
    )
    """Start of A and B; pissa arXiv:2404.02948, olora arXiv:2406.01775, eva arXiv:2410.07170."""

    pissa_niter: int | None = field(
        default=None, metadata={"min": 0, "only": {**_WITH_FACTORS, "lora.init": ("pissa",)}}
    )
    """Iterations of a randomized SVD, which is quicker; null takes the exact one."""

    eva: EvaConfig = field(
        default_factory=EvaConfig,
        metadata={"only": {**_WITH_FACTORS, "lora.init": ("eva",)}},
    )

    bias: Literal["none", "lora_only", "all"] = "none"
    """Biases of the model to train as well: none, those of layers with an adapter, or all."""

    lora_bias: bool = field(
        default=False,
        metadata={"only": {"lora.variant": ("lora", "lora_fa"), "lora.init": ("kaiming",)}},
    )
    """Give B a bias, trained from zero."""

    targets: tuple[str, ...] | Literal["auto", "all-linear"] = "auto"
    """Last parts of layer names, or globs; auto: the usual ones, all-linear: all but the head."""

    exclude: tuple[str, ...] = ()
    """Layers to leave out of targets, named in the same way."""

    layers: tuple[int | str, ...] | None = None
    """Only in these blocks: 0 is the first, -1 the last, "8-11" a range, "top-4" the last four."""

    rank_pattern: Mapping[str, int] = field(
        default_factory=dict, metadata={"min": 1, "only": _WITH_FACTORS}
    )
    """Other ranks, named as in targets; the first match counts: {"*.layer.0.*": 16, query: 4}."""

    alpha_pattern: Mapping[str, float] = field(
        default_factory=dict, metadata={"above": 0, "only": _WITH_FACTORS}
    )
    """Other strengths by layer, named as in targets: {query: 8}."""

    target_parameters: tuple[str, ...] = field(
        default=(),
        metadata={
            "only": {"lora.variant": ("lora", "lora_fa"), "lora.init": ("kaiming", "gaussian")}
        },
    )
    """Fused weights of experts, by the last parts of their names, such as experts.down_proj."""

    modules_to_save: tuple[str, ...] = ()
    """Modules trained and saved whole, besides every newly initialised one (such as the head)."""

    trainable_tokens: tuple[str, ...] = field(
        default=(), metadata={"text": True, "only": _NOT_VERA}
    )
    """Tokens to train the embeddings of; those that the vocabulary lacks are added to it."""

    adalora: AdaLoraConfig = field(
        default_factory=AdaLoraConfig, metadata={"only": {"lora.variant": ("adalora",)}}
    )

    vera: VeraConfig = field(
        default_factory=VeraConfig, metadata={"only": {"lora.variant": ("vera",)}}
    )

"""Which class adapts which kind of layer, for each variant."""

from collections.abc import Callable
from typing import Any

from torch import nn

from lora_cli.errors import Problem, UserError
from lora_cli.lora.adalora import AdaLoraLinear
from lora_cli.lora.attention import LoraAttention
from lora_cli.lora.conv import LoraConv
from lora_cli.lora.dora import DoraConv, DoraEmbedding, DoraLinear
from lora_cli.lora.embedding import LoraEmbedding
from lora_cli.lora.kinds import kind_of
from lora_cli.lora.layer import AdapterLayer
from lora_cli.lora.linear import LoraLinear
from lora_cli.lora.lora_fa import LoraFaConv, LoraFaLinear
from lora_cli.lora.settings import LoraSettings
from lora_cli.lora.vera import VeraLinear

Builder = Callable[..., AdapterLayer]


def _low_rank(layer: Callable[..., AdapterLayer]) -> Builder:
    """Return the builder of a layer that multiplies its inputs."""

    def build(base: Any, *, r: int, alpha: float, settings: LoraSettings) -> AdapterLayer:
        return layer(
            base,
            r=r,
            alpha=alpha,
            dropout=settings.dropout,
            rslora=settings.rslora,
            lora_bias=settings.lora_bias,
        )

    return build


def _low_rank_table(layer: Callable[..., AdapterLayer]) -> Builder:
    """Return the builder of a layer that looks rows up: nothing can be dropped out of that."""

    def build(base: Any, *, r: int, alpha: float, settings: LoraSettings) -> AdapterLayer:
        if settings.lora_bias:
            raise ValueError("An embedding gets an update without bias, but B is to have one.")
        return layer(base, r=r, alpha=alpha, rslora=settings.rslora)

    return build


def _lora_attention(base: Any, *, r: int, alpha: float, settings: LoraSettings) -> AdapterLayer:
    # The sums of its weights are used by code that is not ours, so that no input can be dropped.
    if settings.dropout:
        raise ValueError(
            f"An attention gets an update without dropout, but lora.dropout is {settings.dropout}."
        )
    if settings.lora_bias:
        raise ValueError("An attention gets an update without bias, but B is to have one.")
    return LoraAttention(base, r=r, alpha=alpha, rslora=settings.rslora)


def _adalora_linear(base: Any, *, r: int, alpha: float, settings: LoraSettings) -> AdapterLayer:
    plan = settings.adalora
    return AdaLoraLinear(
        base, r=r if plan is None else plan.init_r, alpha=alpha, dropout=settings.dropout
    )


def _vera_linear(base: Any, *, r: int, alpha: float, settings: LoraSettings) -> AdapterLayer:
    del alpha  # VeRA has none: its two trained vectors scale the update.
    return VeraLinear(base, r=r, d_initial=settings.d_initial, dropout=settings.dropout)


# A variant is added as one row here and one file beside this one.
LAYERS: dict[str, dict[str, Builder]] = {
    "adalora": {
        "linear": _adalora_linear,
        "conv1d": _adalora_linear,
        "quantized": _adalora_linear,
    },
    "dora": {
        "linear": _low_rank(DoraLinear),
        "conv1d": _low_rank(DoraLinear),
        "quantized": _low_rank(DoraLinear),
        "embedding": _low_rank_table(DoraEmbedding),
        "conv": _low_rank(DoraConv),
    },
    "lora": {
        "linear": _low_rank(LoraLinear),
        "conv1d": _low_rank(LoraLinear),
        "quantized": _low_rank(LoraLinear),
        "embedding": _low_rank_table(LoraEmbedding),
        "conv": _low_rank(LoraConv),
        "attention": _lora_attention,
    },
    # Not embeddings: their A starts at zero, where it would stay.
    "lora_fa": {
        "linear": _low_rank(LoraFaLinear),
        "conv1d": _low_rank(LoraFaLinear),
        "quantized": _low_rank(LoraFaLinear),
        "conv": _low_rank(LoraFaConv),
    },
    "vera": {
        "linear": _vera_linear,
        "conv1d": _vera_linear,
        "quantized": _vera_linear,
    },
}


def adaptable_kinds(variant: str) -> tuple[str, ...]:
    """Return the kinds of layers (see `kind_of`) that a variant can adapt."""
    return tuple(LAYERS[variant])


def build_layer(base: nn.Module, name: str, settings: LoraSettings) -> AdapterLayer:
    """Return `base` with an adapter around it.

    Args:
        base: The layer to adapt; it is kept and frozen.
        name: Its path in the model, which decides rank and strength where patterns are set.
        settings: Of the whole adapter.

    Raises:
        UserError: If the variant has no form for this kind of layer, or not for this one.
    """
    kind, table = kind_of(base), LAYERS[settings.variant]
    if kind is None or kind not in table:
        other = ", or take lora.variant=lora" if kind in LAYERS["lora"] else ""
        raise UserError(_unsupported(name, f"is {type(base).__name__}", settings, other))
    r, alpha = settings.r_of(name), settings.alpha_of(name)
    try:
        return table[kind](base, r=r, alpha=alpha, settings=settings)
    except ValueError as error:
        why = f"cannot be: {str(error).removesuffix('.')}"
        raise UserError(_unsupported(name, why, settings)) from None


def _unsupported(name: str, why: str, settings: LoraSettings, other: str = "") -> Problem:
    return Problem(
        id="lora.unsupported-layer",
        message=f"`lora.targets` must name layers that `lora.variant={settings.variant}` can "
        f'adapt, but "{name}" {why}.',
        key="lora.targets",
        allowed=", ".join(LAYERS[settings.variant]),
        fix=f"leave it out with lora.exclude=[{name.rpartition('.')[2]}]{other}",
    )

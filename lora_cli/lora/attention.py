"""LoRA on `nn.MultiheadAttention`, whose projections are weights that are read, never called."""

import torch
from torch import nn

from lora_cli.lora.layer import AdapterLayer
from lora_cli.lora.parameter import LoraParameter, with_parameters


class LoraAttention(LoraParameter):
    """A frozen multi-head attention with low-rank updates of all its projections.

    Queries, keys and values are projected by one matrix, ``in_proj_weight`` of shape (3 E, E), so
    they share one update of rank r; the output projection has its own::

        in_proj_weight + scale * B A        out_proj.weight + scale * B' A'        scale = alpha / r

    The attention runs with these sums, whichever way torch takes: the fused kernels that
    `nn.TransformerEncoderLayer` calls with the weights in evaluation see them too.

    Parameters, named as in adapter state:

    ======================================  ==========  =======
    name                                    shape       trained
    ======================================  ==========  =======
    ``lora_A.weight``                       (r, E)      yes
    ``lora_B.weight``                       (3 E, r)    yes
    ``base_layer.out_proj.lora_A.weight``   (r, E)      yes
    ``base_layer.out_proj.lora_B.weight``   (E, r)      yes
    ======================================  ==========  =======

    Args:
        base: The attention. Its parameters are kept, not copied, and frozen in place.
        r: Rank of each update.
        alpha: Strength of the updates before they are divided.
        rslora: Divide ``alpha`` by ``sqrt(r)`` (arXiv:2312.03732).

    Raises:
        ValueError: If ``r`` is below 1, or keys or values have another size than queries.
    """

    def __init__(
        self, base: nn.MultiheadAttention, *, r: int, alpha: float, rslora: bool = False
    ) -> None:
        fault = unsupported(base)
        if fault:
            raise ValueError(f"An attention must project all its inputs at once, but {fault}.")
        # A twin, so that `base` itself is what it was until the layer takes its place.
        twin = with_parameters(base, {})
        twin.out_proj = LoraParameter(base.out_proj, "weight", r=r, alpha=alpha, rslora=rslora)
        super().__init__(twin, "in_proj_weight", r=r, alpha=alpha, rslora=rslora)
        for parameter in self.base_layer.out_proj.trained_parameters():
            parameter.requires_grad_(True)

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """Return a plain attention that computes the same function."""
        plain = super().merged()
        if isinstance(plain.out_proj, AdapterLayer):
            plain.out_proj = plain.out_proj.merged()
        return plain


def unsupported(attention: nn.MultiheadAttention) -> str | None:
    """Return why an attention cannot be adapted, as the end of a sentence; None if it can."""
    if attention.in_proj_weight is None:
        sizes = f"{attention.embed_dim}, {attention.kdim} and {attention.vdim}"
        return f"queries, keys and values have {sizes} features"
    return None

"""An embedding with a low-rank update (Hu et al. 2021, "LoRA", arXiv:2106.09685)."""

import copy
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from lora_cli.lora.kinds import add_in_float
from lora_cli.lora.layer import TransparentLayer
from lora_cli.lora.settings import scale_of


class LoraEmbedding(TransparentLayer):
    r"""A frozen embedding plus a trainable low-rank update of its table.

    Row ``i`` of the table W, of shape ``(num_embeddings, embedding_dim)``, becomes::

        W[i] + scale * B A[:, i]        scale = alpha / r

    and the layer returns such rows in the dtype of ``base(ids)``. A starts at zero and B from a
    standard Gaussian, so a new layer returns exactly ``base(ids)``. B is drawn from torch's global
    generator.

    Classes of transformers that multiply what they look up by ``embed_scale`` (Gemma, BART) have
    the update multiplied by the same number. There is no dropout: an input is the number of a row,
    of which no element can be left out. The paper adapts attention only; this is the authors' code,
    as it is PEFT's.

    Parameters, named as in adapter state after ``base_layer`` is left out:

    =====================  ===============================  =======  ========
    name                   shape                            trained  dtype
    =====================  ===============================  =======  ========
    ``base_layer.weight``  (num_embeddings, embedding_dim)  no       as given
    ``lora_embedding_A``   (r, num_embeddings)              yes      float32
    ``lora_embedding_B``   (embedding_dim, r)               yes      float32
    =====================  ===============================  =======  ========

    Args:
        base: The embedding to adapt. It is kept, not copied, and frozen in place.
        r: Rank of the update. Adds ``r * (num_embeddings + embedding_dim)`` parameters.
        alpha: Strength of the update before division by ``r``.
        rslora: Divide ``alpha`` by ``sqrt(r)`` (arXiv:2312.03732).

    Raises:
        ValueError: If ``r`` is below 1, or the class does more than to look up rows and scale them.

    Example:
        >>> layer = LoraEmbedding(nn.Embedding(10, 6), r=2, alpha=4.0)
        >>> ids = torch.tensor([[1, 2, 3]])
        >>> torch.equal(layer(ids), layer.base_layer(ids))
        True
        >>> layer.own_tensors()["lora_embedding_A"].shape
        torch.Size([2, 10])
    """

    def __init__(self, base: nn.Embedding, *, r: int, alpha: float, rslora: bool = False) -> None:
        super().__init__()
        if r < 1:
            raise ValueError(f"r must be at least 1, but is {r}.")
        fault = unsupported(base)
        if fault:
            raise ValueError(f"An embedding must look up rows of its own weight, but {fault}.")
        rows, size = base.weight.shape
        kind: dict[str, Any] = {"device": base.weight.device, "dtype": torch.float32}
        self.base_layer = base.requires_grad_(False)
        self.lora_embedding_A = nn.Parameter(torch.zeros(r, rows, **kind))
        self.lora_embedding_B = nn.Parameter(torch.empty(size, r, **kind))
        self.scale = scale_of(r, alpha, rslora=rslora)
        nn.init.normal_(self.lora_embedding_B)
        self.train(base.training)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the updated rows with the numbers `ids`, (..., embedding_dim)."""
        result: torch.Tensor = self.base_layer(ids)
        return (result + self.update(ids) * self.scale).to(result.dtype)

    def update(self, ids: torch.Tensor) -> torch.Tensor:
        """Return ``B A[:, ids]``, times what the class multiplies by."""
        base = self.base_layer
        picked = functional.embedding(
            ids,
            self.lora_embedding_A.T,
            padding_idx=base.padding_idx,
            scale_grad_by_freq=base.scale_grad_by_freq,
        )
        update = picked @ self.lora_embedding_B.T
        if _looks_up_only(base):
            return update
        factor = base.embed_scale
        # The classes that keep it as a tensor round it to the dtype of the table.
        return update * (
            factor.to(base.weight.dtype) if isinstance(factor, torch.Tensor) else factor
        )

    @torch.no_grad()
    def delta_weight(self) -> torch.Tensor:
        """Return the update of the table, (num_embeddings, embedding_dim), float32."""
        A, B = self.lora_embedding_A, self.lora_embedding_B
        with torch.autocast(A.device.type, enabled=False):
            return (A.T @ B.T) * self.scale

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """Return a frozen embedding of the same class that gives the same rows.

        The sum is taken in float32 and rounded once to the dtype of the table. ``self`` is left as
        it was.
        """
        return self.with_weight(add_in_float(self.base_layer.weight, self.delta_weight()))

    def with_weight(self, weight: torch.Tensor) -> nn.Module:
        """Return a frozen layer like the base, but with another table."""
        parameter = nn.Parameter(weight, requires_grad=False)
        # The memo holds a tensor that is copied already, so the old table is not.
        plain: nn.Module = copy.deepcopy(self.base_layer, {id(self.base_layer.weight): parameter})
        return plain


def unsupported(base: nn.Embedding) -> str | None:
    """Return what an embedding does that an update of its table does not follow, if anything."""
    own = [name for name, _ in base.named_parameters()]
    factor = getattr(base, "embed_scale", None)
    if own != ["weight"]:
        return f"{type(base).__name__} computes with {', '.join(own)}"
    if base.max_norm is not None:
        return "it shortens rows of its weight where they are longer than max_norm"
    if _looks_up_only(base):
        return None
    is_number = isinstance(factor, int | float)
    if is_number or (isinstance(factor, torch.Tensor) and factor.numel() == 1):
        return None
    return f"{type(base).__name__} has a way of its own"


def _looks_up_only(base: nn.Module) -> bool:
    return type(base).forward is nn.Embedding.forward

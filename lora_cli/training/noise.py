"""NEFTune: noise on the input embeddings while training (Jain et al. 2023, arXiv:2310.05914)."""

from typing import Any

import torch
from torch import nn

from lora_cli.errors import Problem, UserError

KEY = "trainer.neftune_alpha"


def check_noise(model: Any) -> None:
    """Check that a model embeds tokens, by a table that noise can be added to.

    Raises:
        UserError: If it does not.
    """
    if _embedding_of(model) is None:
        raise UserError(
            Problem(
                id="trainer.no-embedding",
                message=f"`{KEY}` must be null for a model that has no embedding of tokens, but is"
                " set.",
                key=KEY,
                fix=f"{KEY}=null",
            )
        )


def add_noise(model: Any, alpha: float) -> None:
    """Add noise to the token embeddings of every forward pass in training, in place.

    To each number of the embedding of a token is added, with ``u`` uniform in [-1, 1]::

        alpha / sqrt(L * d) * u

    where ``L`` is the number of tokens of the row, padding aside, and ``d`` the width. The paper
    takes the length of the padded batch for ``L``; here a row has the same noise in any batch.
    Drawn from the generator that each step seeds, so that a resumed run draws the same.

    Args:
        model: With adapters in place.
        alpha: Strength; the paper uses 5 to 15.

    Raises:
        UserError: If the model embeds no tokens.
    """
    check_noise(model)
    masks: list[torch.Tensor | None] = [None]

    def note_mask(_: nn.Module, __: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        masks[0] = kwargs.get("attention_mask")

    def disturb(module: nn.Module, _: tuple[Any, ...], embedded: torch.Tensor) -> torch.Tensor:
        if not module.training:
            return embedded
        return embedded + _noise(embedded, masks[0], alpha)

    model.register_forward_pre_hook(note_mask, with_kwargs=True)
    embedding = _embedding_of(model)
    if embedding is not None:
        embedding.register_forward_hook(disturb)


def _noise(embedded_BTD: torch.Tensor, mask_BT: torch.Tensor | None, alpha: float) -> torch.Tensor:
    uniform_BTD = torch.rand_like(embedded_BTD, dtype=torch.float32) * 2 - 1
    valid_BT = embedded_BTD.new_ones(embedded_BTD.shape[:2], dtype=torch.float32)
    # A second table, such as that of a decoder, may be looked up for rows of another length.
    if mask_BT is not None and mask_BT.shape == valid_BT.shape:
        valid_BT = mask_BT.to(valid_BT)
    lengths_B = valid_BT.sum(dim=1).clamp(min=1)
    strength_B = alpha / (lengths_B * embedded_BTD.shape[-1]).sqrt()
    return (uniform_BTD * valid_BT[..., None] * strength_B[:, None, None]).to(embedded_BTD.dtype)


def _embedding_of(model: Any) -> nn.Module | None:
    """Return what embeds tokens, with adapters around it if it has any."""
    try:
        found = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    inner = found
    while hasattr(inner, "base_layer"):
        inner = inner.base_layer
    return found if isinstance(inner, nn.Embedding) else None

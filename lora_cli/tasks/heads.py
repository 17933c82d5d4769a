"""Base models with the head of a task."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lora_cli.errors import Problem, UserError
from lora_cli.models.base import BaseModel, load_base
from lora_cli.models.heads import head_names, renew_heads
from lora_cli.models.sources import ModelSource
from lora_cli.tasks.contract import Family

_DECODERS = ("AutoModelForCausalLM", "AutoModelForImageTextToText")
_PROBED = 6
# Of the change at the place of another token, what the places before it may change by rounding.
_SHARE = 1e-2


def load_with_head(
    source: ModelSource, family: Family, state: Mapping[str, Any], *, dtype: str, seed: int
) -> BaseModel:
    """Load a base model with the head of a task, as it is before training.

    Args:
        source: What `resolve_model` found.
        family: The family of the task.
        state: What the task learned from its data.
        dtype: As in `load_base`.
        seed: Decides the start of a new head.

    Raises:
        UserError: As `load_base` does, and if a model that is to predict the next token is shown
            that token.
    """
    base = load_base(
        source,
        auto_class=family.auto_class,
        options=family.model_options(state),
        dtype=dtype,
        seed=seed,
    )
    if family.auto_class in _DECODERS and sees_later_tokens(base.model):
        raise UserError(_no_decoder(base.model, source))
    fits, note = family.check_head(source, state)
    if not fits and not any(key.startswith(head_names(base.model)) for key in base.new_keys):
        new = (*base.new_keys, *renew_heads(base.model, seed=seed))
        base = replace(base, new_keys=tuple(sorted(new)), notes=(note,))
    elif fits and note:
        base = replace(base, notes=(note,))
    family.fit_model(base.model, state)
    # A part that was taken out is not trained.
    kept = base.model.state_dict().keys()
    base = replace(base, new_keys=tuple(name for name in base.new_keys if name in kept))
    if base.new_keys:
        family.start_head(base.model, state)
    return base


def sees_later_tokens(model: nn.Module) -> bool:
    """Whether what a model says at a token depends on those behind it.

    That is so of encoders, some of which transformers loads with a head for the next token: they
    would learn to copy it. Two texts that differ in their last token alone are compared.

    Args:
        model: A model with a language modelling head, in evaluation mode.
    """
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]  # of transformers
    first = embeddings.weight.shape[0] // 2
    ids = torch.arange(first - _PROBED, first, device=embeddings.weight.device)
    texts = torch.stack([ids, torch.cat([ids[:-1], ids[:1]])])
    with torch.inference_mode():
        one, other = model(input_ids=texts).logits.float()
    change_T = (one - other).abs().amax(dim=-1)
    return bool(change_T[:-1].max() > _SHARE * change_T[-1])


def _no_decoder(model: nn.Module, source: ModelSource) -> Problem:
    kind: Any = model.config
    return Problem(
        id="model.no-decoder",
        message="`model.path` must name a decoder, which tells each token from those before it, "
        f"but this {kind.model_type} is shown those behind it too.",
        key="model.path",
        where=str(source.folder),
        allowed="models that were made to write, such as gpt2, llama3.2-1b, qwen3-0.6b, smollm2",
        fix="choose a decoder: lora-cli models decoder. To train an encoder on plain text: "
        "task=masked_language_modeling",
    )

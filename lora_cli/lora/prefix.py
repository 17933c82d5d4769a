"""Prefix tuning: trained keys and values before those of the text, in every attention.

Li and Liang 2021, "Prefix-Tuning", section 4 (arXiv:2101.00190), with keys and values trained
directly rather than through a network (as in P-Tuning v2, arXiv:2110.07602). The prefix reaches the
attention in the way that keys and values of earlier tokens do when text is generated: as the cache
of the model. It is no part of a weight, so it cannot be merged.
"""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lora_cli.errors import Problem, UserError

# Where the prefix is in a model; no model of transformers has a part of that name.
NAME = "prefix_tuning"
STATE = f"{NAME}.embeddings"


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefixSize:
    """How large a prefix is.

    Attributes:
        num_tokens: Length.
        num_layers: Layers of the model.
        num_heads: Heads of keys and values in a layer.
        head_size: Width of a head.
    """

    num_tokens: int
    num_layers: int
    num_heads: int
    head_size: int

    @property
    def token_size(self) -> int:
        """Width of the keys, or of the values, of one token in one layer."""
        return self.num_heads * self.head_size

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the trained matrix: (num_tokens, num_layers * 2 * token_size)."""
        return self.num_tokens, self.num_layers * 2 * self.token_size


class Prefix(nn.Module):
    """The keys and values of a prefix.

    ``embeddings`` has a row for each token of the prefix; in a row stand the keys of layer 0, its
    values, the keys of layer 1, ..., each head by head, in float32.

    Args:
        embeddings: The start.
        size: What its numbers mean.
    """

    def __init__(self, embeddings: torch.Tensor, size: PrefixSize) -> None:
        super().__init__()
        self.embeddings = nn.Parameter(embeddings.float().reshape(size.shape).contiguous())
        self.size = size
        self.is_left_out = False

    def cache(self, rows: int, dtype: torch.dtype) -> Any:
        """Return a new cache that holds the prefix for each of `rows` rows."""
        # Layers that look at the last tokens only mask the others by themselves.
        cache = _empty_cache()
        self.fill(cache, rows, dtype)
        return cache

    def fill(self, cache: Any, rows: int, dtype: torch.dtype) -> None:
        """Put the prefix for each of `rows` rows into an empty cache."""
        size = self.size
        parts = self.embeddings.to(dtype).view(
            size.num_tokens, size.num_layers, 2, size.num_heads, size.head_size
        )
        for layer, pair in enumerate(parts.permute(1, 2, 3, 0, 4)):
            keys, values = (part.expand(rows, *part.shape) for part in pair)
            cache.update(keys, values, layer)
        setattr(cache, NAME, True)

    def prepend(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Add the prefix to the inputs of a forward pass; a hook.

        Raises:
            ValueError: If the caller's cache holds tokens, but not the prefix before them.
        """
        if self.is_left_out:
            return args, kwargs
        names = list(inspect.signature(module.forward).parameters)
        inputs = dict(zip(names, args, strict=False)) | kwargs
        tokens = inputs.get("input_ids")
        tokens = inputs["inputs_embeds"] if tokens is None else tokens
        mask = inputs.get("attention_mask")
        if mask is not None:
            ones = mask.new_ones(mask.shape[0], self.size.num_tokens)
            inputs["attention_mask"] = torch.cat([ones, mask], dim=1)
        if inputs.get("position_ids") is not None:
            inputs["position_ids"] = inputs["position_ids"] + self.size.num_tokens
        dtype = next(module.parameters()).dtype
        if inputs.get("past_key_values") is None:
            inputs["past_key_values"] = self.cache(tokens.shape[0], dtype)
        elif not inputs["past_key_values"].get_seq_length():
            self.fill(inputs["past_key_values"], tokens.shape[0], dtype)
        elif not getattr(inputs["past_key_values"], NAME, False):
            raise ValueError("A model with a prefix must be called without a cache of its own.")
        return (), inputs


def put_prefix(model: Any, *, num_tokens: int, seed: int) -> PrefixSize:
    """Put a prefix before every attention of a model, in place.

    It starts as the keys and values that the model itself gives to `num_tokens` tokens drawn from
    its vocabulary: the paper finds that activations of real words are the better start than random
    numbers (section 7.4).

    Args:
        model: A model of transformers.
        num_tokens: Length of the prefix.
        seed: Decides which tokens; the caller's random state is kept.

    Raises:
        UserError: If the model takes no keys and values from elsewhere, looks at images too, or has
            an encoder and a decoder; nothing is changed then.
    """
    backbone = model.base_model
    family = str(getattr(model.config, "model_type", type(model).__name__))
    if getattr(model.config, "is_encoder_decoder", False):
        why = f"{family} has two stacks, of which a cache reaches the decoder only"
        raise UserError(_unsuited(why))
    if getattr(model.config, "vision_config", None) is not None:
        why = f"{family} counts the places of images by itself"
        raise UserError(_unsuited(why))
    pairs = _probe(backbone, num_tokens, seed)
    if not any(pair.numel() for pair in pairs):
        why = f"the attention of {family} in transformers takes none (past_key_values)"
        raise UserError(_unsuited(why))
    if len({pair.shape for pair in pairs}) > 1:
        why = f"the layers of {family} differ in the keys that they have"
        raise UserError(_unsuited(why))
    # (layers, 2, heads, tokens, width) to one row a token.
    values = torch.stack(pairs).permute(3, 0, 1, 2, 4)
    _, num_layers, _, num_heads, head_size = values.shape
    size = PrefixSize(
        num_tokens=num_tokens, num_layers=num_layers, num_heads=num_heads, head_size=head_size
    )
    prefix = Prefix(values, size).train(model.training)
    model.add_module(NAME, prefix)
    backbone.register_forward_pre_hook(prefix.prepend, with_kwargs=True)
    return size


@contextmanager
def without_prefix(model: nn.Module) -> Iterator[None]:
    """Within, a prefix in `model` is left out, so that it is the base model; without one, nothing.

    A prefix is no small change at the start, as an update of a weight is.
    """
    prefixes = [module for module in model.modules() if isinstance(module, Prefix)]
    for prefix in prefixes:
        prefix.is_left_out = True
    try:
        yield
    finally:
        for prefix in prefixes:
            prefix.is_left_out = False


def _probe(backbone: Any, num_tokens: int, seed: int) -> list[torch.Tensor]:
    """Return what a model keeps of random tokens: (2, heads, tokens, width) for each layer."""
    embeddings = backbone.get_input_embeddings()
    padding = getattr(backbone.config, "pad_token_id", None)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(embeddings.num_embeddings, (1, num_tokens), generator=generator)
    if padding is not None:
        tokens[tokens == padding] = (padding + 1) % embeddings.num_embeddings
    cache = _empty_cache()
    modes: Mapping[nn.Module, bool] = {m: m.training for m in backbone.modules()}
    backbone.eval()
    try:
        with torch.no_grad():
            tokens = tokens.to(embeddings.weight.device)
            backbone(tokens, attention_mask=torch.ones_like(tokens), past_key_values=cache)
    except TypeError:
        # A model without a cache may refuse the argument.
        return []
    finally:
        for module, mode in modes.items():
            module.training = mode
    # Layers of other kinds than attention keep something else, or nothing.
    kept = [(getattr(x, "keys", None), getattr(x, "values", None)) for x in cache.layers]
    return [
        torch.cat([keys, values]) if keys is not None and values is not None else torch.empty(0)
        for keys, values in kept
    ]


def _unsuited(why: str) -> Problem:
    return Problem(
        id="strategy.no-prefix",
        message="`strategy=prefix` must have a model whose attention takes keys and values from "
        f"elsewhere, but {why}.",
        key="strategy",
        allowed="decoders such as gpt2, llama and qwen3; bert, roberta, xlm-roberta and electra",
        fix="strategy=adapter or strategy=lora, which work with this model",
    )


def _empty_cache() -> Any:
    # Who only reads adapters does without transformers, whose import takes its time.
    from transformers import DynamicCache

    return DynamicCache()

"""Training without padding: the blocks of a model see real tokens alone.

Rows of a batch differ in length, and the shorter ones are padded. Before the first block of the
model the hidden states of the real tokens are put behind each other in one line (1, N, H), and
behind the last block they go back to their places, with zeros at padding. Linear layers, norms and
activations, which are most of the work and look at each token by itself, so compute no padding.
Attention is given its rows back: queries, keys and values of rows of like length are padded to the
longest of them, with the mask that the model has made. Embeddings, poolers and heads see the batch
as ever, so what the model returns has the usual shapes, and gradients are the same to rounding.

All of it is done by hooks, in training alone: rows of an evaluation are sorted by length before.
Shapes: B rows of T tokens, N of them real, H hidden units, D of a head.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from inspect import signature
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from lora_cli.lora.blocks import block_of
from lora_cli.lora.prefix import Prefix
from lora_cli.training.sharding import is_sharded
from lora_cli.training.token_line import Layout, layout_of

_NAME = "padding_free"
_DROPPING = ("layerdrop", "encoder_layerdrop", "decoder_layerdrop")


_ACTIVE: ContextVar[Layout | None] = ContextVar("padding_free_layout", default=None)


def active_layout() -> Layout | None:
    """Return where the real tokens of the batch are that is run without padding, if one is."""
    return _ACTIVE.get()


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Compute the attention of tokens in a line, (1, heads, N, D); else as transformers does."""
    layout = active_layout()
    line = (1, 0 if layout is None else layout.count)
    if layout is None or any((x.shape[0], x.shape[2]) != line for x in (query, key, value)):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    lines = [x.squeeze(0).transpose(0, 1) for x in (query, key, value)]
    found = []
    for group, mask in zip(layout.groups, layout.masks_of(attention_mask), strict=True):
        rows = (group.pad(x).transpose(1, 2) for x in lines)
        output, _ = sdpa_attention_forward(
            module, next(rows), next(rows), next(rows), mask, **options
        )
        found.append(group.unpad(output))
    return torch.cat(found).unsqueeze(0), None


def _mask(*args: Any, **options: Any) -> torch.Tensor | None:
    """Make the mask that transformers would; none where `is_causal` says it all.

    No token sees those behind it there, and padding is behind all.
    """
    is_plain = options.get("mask_function") is causal_mask_function
    if _ACTIVE.get() is not None and is_plain and options.get("allow_is_causal_skip", False):
        return None
    mask: torch.Tensor | None = sdpa_mask(*args, **options)
    return mask


AttentionInterface.register(_NAME, attend)
AttentionMaskInterface.register(_NAME, _mask)


def why_padded(model: Any) -> str | None:
    """Say why the blocks of a model cannot be run without padding; None if they may be.

    Whether they say the same then is for a trial to find out.
    """
    name = type(model).__name__
    if any(isinstance(module, Prefix) for module in model.modules()):
        return "the prefix of a row is in the cache of its attention"
    dropped = [one for one in _DROPPING if getattr(model.config, one, 0)]
    if dropped:
        return f"{name} leaves out blocks at random ({dropped[0]})"
    stacks = _stacks(model)
    if len(stacks) != 1:
        return f"{name} has {len(stacks) or 'no'} stacks of blocks"
    if any(config._attn_implementation != "sdpa" for config in _configs(model, stacks[0])):
        return f"{name} computes its attention in a way of its own"
    return None


class PaddingFree:
    """The hooks by which a model runs its blocks without padding, in training.

    Args:
        model: One that `why_padded` says nothing of, with adapters in place.

    Attributes:
        batches: How many passes were run so.
        last_block: Gives the hidden states of the batch, each at its place.
    """

    def __init__(self, model: Any) -> None:
        self.batches = 0
        self._is_tried = False
        (stack,) = _stacks(model)
        blocks = list(model.get_submodule(stack))
        self.last_block: nn.Module = blocks[-1]
        backbone = model.base_model
        self._configs = _configs(model, stack)
        self._names = list(signature(backbone.forward).parameters)
        self._handles = [
            backbone.register_forward_pre_hook(self._enter, with_kwargs=True),
            backbone.register_forward_hook(self._leave, always_call=True),
            *(block.register_forward_pre_hook(_pack_inputs, with_kwargs=True) for block in blocks),
            blocks[-1].register_forward_hook(self._unpack_output),
        ]

    def remove(self) -> None:
        """Let the model be as it was."""
        for handle in self._handles:
            handle.remove()

    @contextmanager
    def tried(self) -> Iterator[None]:
        """Within, padding is left out in evaluation mode as well."""
        self._is_tried = True
        try:
            yield
        finally:
            self._is_tried = False

    def _enter(
        self, backbone: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        self._leave()
        if not (backbone.training or self._is_tried) or is_sharded(self.last_block):
            return None
        inputs = dict(zip(self._names, args, strict=False)) | kwargs
        mask = inputs.get("attention_mask")
        asked = ("past_key_values", "use_cache", "output_hidden_states", "output_attentions")
        if not isinstance(mask, torch.Tensor) or mask.ndim != 2:
            return None
        if any(inputs.get(name) is not None and inputs[name] is not False for name in asked):
            return None
        layout = layout_of(mask)
        if layout is None:
            return None
        _ACTIVE.set(layout)
        for config in self._configs:
            config._attn_implementation_internal = _NAME
        # A cache would be filled with the line, for nobody.
        no_cache = {"use_cache": False} if "use_cache" in self._names else {}
        return (), {**inputs, **no_cache}

    def _leave(self, *_: Any) -> None:
        if _ACTIVE.get() is not None:
            _ACTIVE.set(None)
        for config in self._configs:
            config._attn_implementation_internal = "sdpa"

    def _unpack_output(self, _: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        layout = _ACTIVE.get()
        hidden = output[0] if isinstance(output, tuple) else output
        if layout is None or hidden.shape[:2] != (1, layout.count):
            return None
        self.batches += 1
        whole = layout.unpack(hidden)
        return (whole, *output[1:]) if isinstance(output, tuple) else whole


def _pack_inputs(
    _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Put what a block is given for each token into a line; a mask is left as it is."""
    layout = _ACTIVE.get()
    if layout is None:
        return None
    given = dict(kwargs)
    for name in ("hidden_states", "position_ids", "position_embeddings"):
        value = given.get(name)
        if isinstance(value, torch.Tensor):
            given[name] = layout.pack(value)
        elif isinstance(value, tuple):
            given[name] = tuple(layout.pack(part) for part in value)
    return (*map(layout.pack, args[:1]), *args[1:]), given


def _stacks(model: nn.Module) -> list[str]:
    """Return the paths of the lists of blocks."""
    found = {
        block.stack
        for block in (block_of(name) for name, _ in model.named_modules())
        if block is not None
    }
    return sorted(name for name in found if isinstance(model.get_submodule(name), nn.ModuleList))


def _configs(model: Any, stack: str) -> list[Any]:
    """Return the different configurations that a model and its blocks read."""
    modules = (model, model.base_model, *model.get_submodule(stack).modules())
    found = [module.config for module in modules if hasattr(module, "config")]
    return list({id(config): config for config in found}.values())

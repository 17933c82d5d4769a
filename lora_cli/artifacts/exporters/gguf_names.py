"""Names and order of the weights of a Llama in llama.cpp, which are those of its GGUF files."""

import re
from typing import Any

import torch

_LAYERS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_OTHERS = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
_BLOCK = re.compile(r"model\.layers\.(\d+)\.(.+)")


def gguf_name(module: str) -> str | None:
    """Return llama.cpp's name of a module of a Llama, or None if it has none.

    >>> gguf_name("model.layers.3.self_attn.q_proj"), gguf_name("lm_head")
    ('blk.3.attn_q', 'output')
    """
    if found := _BLOCK.fullmatch(module):
        layer = _LAYERS.get(found[2])
        return None if layer is None else f"blk.{found[1]}.{layer}"
    return _OTHERS.get(module)


def heads_of(module: str, config: Any) -> int | None:
    """Return the number of heads whose rows llama.cpp has in another order; None for most modules.

    Both rotate pairs of features of a head by the same angles, but transformers pairs a feature of
    the first half with one of the second, and llama.cpp one with its neighbour.
    """
    if module.endswith("self_attn.q_proj"):
        return int(config.num_attention_heads)
    if module.endswith("self_attn.k_proj"):
        return int(config.num_key_value_heads)
    return None


def interleave(rows: torch.Tensor, heads: int | None) -> torch.Tensor:
    """Return the rows of a weight, (heads * features, ...), in llama.cpp's order of features.

    >>> interleave(torch.tensor([[0], [1], [2], [3]]), 1).flatten().tolist()
    [0, 2, 1, 3]
    """
    if heads is None:
        return rows
    halves = rows.reshape(heads, 2, -1, *rows.shape[1:])
    return halves.transpose(1, 2).reshape(rows.shape)


def separate(rows: torch.Tensor, heads: int | None) -> torch.Tensor:
    """Undo `interleave`.

    >>> separate(torch.tensor([[0], [2], [1], [3]]), 1).flatten().tolist()
    [0, 1, 2, 3]
    """
    if heads is None:
        return rows
    pairs = rows.reshape(heads, -1, 2, *rows.shape[1:])
    return pairs.transpose(1, 2).reshape(rows.shape)

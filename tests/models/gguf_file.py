"""A tiny Llama in the GGUF format, written with llama.cpp's own Python package."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

WORDS = ("good", "bad", "dull", "fine", "film", "plot")
_SPECIAL = ("<unk>", "<s>", "</s>")
_NAMES = {
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
_OUTSIDE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def tiny_llama(seed: int = 0) -> LlamaForCausalLM:
    """A random Llama whose vocabulary is that of the file."""
    config = LlamaConfig(
        vocab_size=len(tokens()[0]),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config).eval()


def tokens() -> tuple[list[str], list[str]]:
    """Return a byte-level vocabulary, in which each word is one token, and its merges."""
    letters = sorted({letter for word in WORDS for letter in f"Ġ{word}"})
    merges: list[str] = []
    pieces: list[str] = []
    for word in WORDS:
        left = "Ġ"
        for letter in word:
            merges.append(f"{left} {letter}")
            left += letter
            pieces.append(left)
    return [*_SPECIAL, *letters, *dict.fromkeys(pieces)], list(dict.fromkeys(merges))


def write_gguf(
    path: Path, model: LlamaForCausalLM, *, kind: str = "F32", tokenizer: bool = True
) -> None:
    """Write a model in blocks of a kind such as Q8_0; vectors stay float32."""
    config: Any = model.config
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    if tokenizer:
        _add_tokenizer(writer)
    quantization = gguf.GGMLQuantizationType[kind]
    for name, tensor in model.state_dict().items():
        values = _stored(name, tensor.float().numpy(), config)
        if values.ndim < 2 or kind == "F32":
            writer.add_tensor(_gguf_name(name), values.astype(np.float32))
            continue
        blocks = gguf.quants.quantize(values, quantization)
        writer.add_tensor(_gguf_name(name), blocks, raw_dtype=quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_tokenizer(writer: gguf.GGUFWriter) -> None:
    pieces, merges = tokens()
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(pieces)
    writer.add_token_types([control if piece in _SPECIAL else normal for piece in pieces])
    writer.add_token_merges(merges)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def _gguf_name(name: str) -> str:
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    _, _, block, *path, leaf = name.split(".")
    return f"blk.{block}.{_NAMES['.'.join(path)]}.{leaf}"


def _stored(name: str, values: np.ndarray[Any, Any], config: Any) -> np.ndarray[Any, Any]:
    """llama.cpp rotates neighbouring features where transformers rotates halves of a head."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    count = heads.get(name.split(".")[-2])
    if count is None:
        return values
    halves = values.reshape(count, 2, -1, values.shape[-1])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(values.shape))

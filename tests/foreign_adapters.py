"""A tiny Llama, updates of its layers, and what plain algebra makes of both."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from safetensors.torch import save_file

HEADS, KV_HEADS, SIZE = 4, 2, 16
IDS = torch.tensor([[1, 5, 9, 3, 7, 2]])
# Name, inputs and outputs.
SHAPES = {
    "model.layers.0.self_attn.q_proj": (16, 16),
    "model.layers.0.self_attn.k_proj": (16, 8),
    "model.layers.1.self_attn.v_proj": (16, 8),
    "model.layers.1.mlp.down_proj": (24, 16),
}
Updates = dict[str, tuple[torch.Tensor, torch.Tensor]]


def write_llama(folder: Path) -> Path:
    """Write a tiny Llama with random weights."""
    config = transformers.LlamaConfig(
        hidden_size=SIZE,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        vocab_size=20,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def updates(r: int | Mapping[str, int] = 3) -> Updates:
    """Return random A (r, inputs) and B (outputs, r) for each layer of `SHAPES`."""
    generator = torch.Generator().manual_seed(1)
    found = {}
    for name, (inputs, outputs) in SHAPES.items():
        rank = r if isinstance(r, int) else r[name]
        found[name] = (
            torch.randn(rank, inputs, generator=generator),
            torch.randn(outputs, rank, generator=generator),
        )
    return found


def added_logits(base: Path, deltas: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return the logits of the model whose W is W + delta."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        for name, delta in deltas.items():
            model.get_submodule(name).weight += delta
        return model.eval()(input_ids=IDS).logits


def peft_logits(base: Path, adapter: Path) -> torch.Tensor:
    """Return the logits of the model with an adapter as peft loads it, every tensor in its place."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    loaded: Any = peft.PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        return loaded.eval()(input_ids=IDS).logits


def write_adapter(
    folder: Path,
    tensors: Mapping[str, torch.Tensor],
    config: Mapping[str, Any] | None = None,
    *,
    name: str = "adapter_model.safetensors",
) -> Path:
    """Write a file of tensors and a config beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / name)
    if config is not None:
        (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder

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
    """Return the logits of the model with an adapter as peft loads it."""
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
    copies = {key: tensor.contiguous().clone() for key, tensor in tensors.items()}
    save_file(copies, folder / name)
    if config is not None:
        (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def loralib(folder: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    found = updates({name: 2 + n for n, name in enumerate(SHAPES)})
    tensors = {f"{name}.lora_A": a for name, (a, _) in found.items()}
    tensors |= {f"{name}.lora_B": b for name, (_, b) in found.items()}
    deltas = {name: 6 / len(a) * b @ a for name, (a, b) in found.items()}
    return write_adapter(folder, tensors, name="lora.safetensors"), deltas


def mlx(folder: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    found = updates(3)
    tensors = {f"{name}.lora_a": a.T for name, (a, _) in found.items()}
    tensors |= {f"{name}.lora_b": b.T for name, (_, b) in found.items()}
    config = {
        "model": "some/llama",
        "fine_tune_type": "lora",
        "num_layers": 2,
        "lora_parameters": {"rank": 3, "scale": 0.7, "dropout": 0.0},
    }
    deltas = {name: 0.7 * b @ a for name, (a, b) in found.items()}
    return write_adapter(folder, tensors, config, name="adapters.safetensors"), deltas


TORCHTUNE = dict(
    zip(
        SHAPES,
        (
            "layers.0.attn.q_proj",
            "layers.0.attn.k_proj",
            "layers.1.attn.v_proj",
            "layers.1.mlp.w2",
        ),
        strict=True,
    )
)


def torchtune(folder: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    found, tensors = updates(3), {}
    for name, theirs in TORCHTUNE.items():
        a, b = found[name]
        for suffix, heads in (("q_proj", HEADS), ("k_proj", KV_HEADS)):
            if name.endswith(suffix):
                # In their order, the two halves of each head alternate.
                b = b.view(heads, 2, -1, 3).transpose(1, 2).reshape(b.shape)
        tensors |= {f"{theirs}.lora_a.weight": a, f"{theirs}.lora_b.weight": b}
    config = {"r": 3, "lora_alpha": 12, "target_modules": ["q_proj", "k_proj", "v_proj", "w2"]}
    deltas = {name: 4 * b @ a for name, (a, b) in found.items()}
    return write_adapter(folder, tensors, config), deltas


def kohya(folder: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    found = updates({name: 2 + n for n, name in enumerate(SHAPES)})
    tensors, deltas = {}, {}
    for n, (name, (a, b)) in enumerate(found.items()):
        spelled = f"lora_te_{name.replace('.', '_')}"
        tensors |= {f"{spelled}.lora_down.weight": a, f"{spelled}.lora_up.weight": b}
        scale = 1.0
        if n:  # the first has no alpha, which means its rank
            tensors[f"{spelled}.alpha"] = torch.tensor(float(n))
            scale = n / len(a)
        deltas[name] = scale * b @ a
    return write_adapter(folder, tensors, name="kohya.safetensors"), deltas


def peft_adapter(base: Path, folder: Path, *, use_dora: bool = False) -> Path:
    """Let peft write an adapter of several ranks and strengths."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["q_proj", "down_proj"],
        rank_pattern={"model.layers.1.mlp.down_proj": 7},
        use_rslora=True,
        use_dora=use_dora,
        task_type="CAUSAL_LM",
    )
    found = peft.get_peft_model(model, config)
    with torch.random.fork_rng():
        torch.manual_seed(2)
        for name, tensor in found.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                torch.nn.init.normal_(tensor)
    found.save_pretrained(folder)
    return folder


def fails(done: Any, problem: str, *words: str) -> None:
    assert done.code == 2, done.err
    assert f"error[{problem}]" in done.err, done.err
    for word in words:
        assert word in done.err, done.err

"""Tiny models, and adapters of them that peft has written with random values."""

from functools import cache
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

IDS = torch.tensor([[1, 5, 6, 7, 3]])
SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}


@cache
def base_of(kind: str) -> Any:
    """A tiny language model, or a tiny classifier with three labels."""
    torch.manual_seed(0)
    if kind == "lm":
        config: Any = transformers.LlamaConfig(**SIZES, tie_word_embeddings=False)
        return transformers.LlamaForCausalLM(config).eval()
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(**SIZES, num_labels=3)
    ).eval()


def fresh(kind: str) -> Any:
    """A copy that PEFT may change."""
    model = type(base_of(kind))(base_of(kind).config)
    model.load_state_dict(base_of(kind).state_dict())
    return model.eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits.clone()


class Made:
    """An adapter that peft trained, or rather shook, and what it says."""

    def __init__(self, folder: Path, kind: str, **config: Any) -> None:
        torch.manual_seed(1)
        method = peft.PEFT_TYPE_TO_CONFIG_MAPPING[config.pop("method", "LORA")]
        model = peft.get_peft_model(fresh(kind), method(**config))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += torch.randn_like(parameter) * 0.3
        self.kind, self.folder, self.says = kind, folder, logits(model)
        model.peft_config["default"].base_model_name_or_path = "org/model"
        model.save_pretrained(folder)


QV: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("lm", QV),
    "rslora": ("lm", {**QV, "use_rslora": True}),
    "dora": ("lm", {**QV, "use_dora": True}),
    "biased": ("lm", {**QV, "lora_bias": True}),
    "patterned": ("lm", {**QV, "rank_pattern": {"layers.0.self_attn.q_proj": 2}}),
    "embedded": ("lm", {"target_modules": ["embed_tokens", "q_proj"]}),
    "tokens": ("lm", {**QV, "trainable_token_indices": [1, 5]}),
    "pissa": ("lm", {**QV, "init_lora_weights": "pissa"}),
    "olora": ("lm", {**QV, "init_lora_weights": "olora"}),
    "layers": ("lm", {**QV, "layers_to_transform": [1]}),
    "excluded": ("lm", {**QV, "exclude_modules": ["layers.0.self_attn.q_proj"]}),
    "head": ("bert", {"target_modules": ["query"], "task_type": "SEQ_CLS"}),
    "whole": ("lm", {**QV, "modules_to_save": ["lm_head"]}),
    "every bias": ("bert", {"target_modules": ["query"], "bias": "all", "task_type": "SEQ_CLS"}),
    "biases of layers": ("bert", {"target_modules": ["query"], "bias": "lora_only"}),
    "all layers": ("lm", {"target_modules": "all-linear"}),
    "by an expression": ("lm", {"target_modules": r".*\.1\..*q_proj"}),
    "lists of layers": ("lm", {**QV, "layers_to_transform": [0], "layers_pattern": "layers"}),
    "adalora": ("lm", {**QV, "method": "ADALORA", "total_step": 10}),
    "vera": ("lm", {**QV, "method": "VERA", "r": 4}),
    "loha": ("lm", {**QV, "method": "LOHA"}),
}

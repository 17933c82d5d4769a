"""Random encoders with a head, and batches for them."""

from typing import Any

import torch
import transformers

LABELS = ("sad", 'gl"ad', "ärger")
SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
    "initializer_range": 0.4,
    "num_labels": 3,
    "pad_token_id": 0,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "bert": {"num_hidden_layers": 1},
    "distilbert": {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32},
    "roberta": {"max_position_embeddings": 70},
    "deberta-v2": {
        "relative_attention": True,
        "pos_att_type": ["p2c", "c2p"],
        "position_buckets": 8,
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True,
        "position_biased_input": False,
    },
    "albert": {"embedding_size": 8},
    "electra": {"embedding_size": 8},
    "modernbert": {"local_attention": 4, "global_attn_every_n_layers": 2},
}


def make_model(family: str, vocabulary: int) -> Any:
    torch.manual_seed(0)
    options = {**SIZES, **FAMILIES[family], "vocab_size": vocabulary}
    if family == "distilbert":
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads"):
            del options[name]
    config = transformers.AutoConfig.for_model(family, **options)
    return transformers.AutoModelForSequenceClassification.from_config(config).eval()


def make_batch(model: Any, rows: int, length: int) -> dict[str, torch.Tensor]:
    """Random tokens, the second row padded from the middle on."""
    draw = torch.Generator().manual_seed(rows * 100 + length)
    ids = torch.randint(5, model.config.vocab_size, (rows, length), generator=draw)
    mask = torch.ones_like(ids)
    if rows > 1:
        mask[1, length // 2 :] = 0
        ids[1, length // 2 :] = model.config.pad_token_id
    mask[:, 0] = 1
    return {"input_ids": ids, "token_type_ids": torch.zeros_like(ids), "attention_mask": mask}


def batches_for(model: Any) -> list[dict[str, torch.Tensor]]:
    """Batches of several sizes, none of which was traced."""
    found = [make_batch(model, *size) for size in ((2, 7), (1, 3), (5, 20), (3, 41), (1, 1))]
    if model.config.model_type in ("distilbert", "modernbert"):
        for batch in found:
            del batch["token_type_ids"]
    return found

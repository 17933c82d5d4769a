"""What a training step keeps for its backward pass, in a model of the size of bert-base.

On the meta device: sizes are exact, nothing is computed.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, VeraConfig, get_peft_model
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from lora_cli.lora.inject import freeze_base, inject_lora
from lora_cli.lora.linear import LoraLinear
from lora_cli.lora.settings import LoraSettings
from lora_cli.lora.targets import match_targets

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)

R, ALPHA, TARGETS = 8, 16, ["query", "value", "intermediate.dense", "output.dense"]
COMMON = {"target_modules": TARGETS, "modules_to_save": ["classifier", "pooler"]}
PEFT_LORA = {"r": R, "lora_alpha": ALPHA, **COMMON}


def settings(variant: str = "lora", **options: Any) -> LoraSettings:
    return LoraSettings(r=R, alpha=ALPHA, variant=variant, **options)


# Ours, and the nearest that PEFT has: it has no LoRA-FA layer, and its PiSSA is plain LoRA on other
# base weights.
CASES: dict[str, tuple[LoraSettings, Callable[[], Any]]] = {
    "lora": (settings(), lambda: LoraConfig(**PEFT_LORA)),
    "dropout": (settings(dropout=0.1), lambda: LoraConfig(lora_dropout=0.1, **PEFT_LORA)),
    "rslora": (settings(rslora=True), lambda: LoraConfig(use_rslora=True, **PEFT_LORA)),
    "dora": (settings("dora"), lambda: LoraConfig(use_dora=True, **PEFT_LORA)),
    "lora_fa": (settings("lora_fa"), lambda: LoraConfig(**PEFT_LORA)),
    "pissa": (settings(init="pissa"), lambda: LoraConfig(**PEFT_LORA)),
    "adalora": (
        settings("adalora"),
        lambda: AdaLoraConfig(init_r=R, target_r=4, total_step=100, **COMMON),
    ),
    "vera": (settings("vera"), lambda: VeraConfig(r=R, **COMMON)),
}


def build() -> nn.Module:
    config = BertConfig(
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, attn_implementation="sdpa"
    )
    with torch.device("meta"):
        return BertForSequenceClassification(config).train()


def saved_bytes(model: nn.Module) -> tuple[int, list[torch.Size]]:
    """Return the bytes kept for the backward pass besides parameters, and the shapes kept."""
    kept: dict[int, torch.Tensor] = {}
    owned = {p.untyped_storage()._cdata for p in (*model.parameters(), *model.buffers())}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()._cdata
        if storage not in owned:
            kept[storage] = tensor
        return tensor

    ids_BT = torch.zeros(4, 64, dtype=torch.long, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(input_ids=ids_BT).logits.sum()
    total = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    return total, [tensor.shape for tensor in kept.values()]


def build_ours(case: LoraSettings) -> nn.Module:
    model, saved = build(), ("bert.pooler", "classifier")
    names = match_targets(model, targets=tuple(TARGETS), saved_modules=saved)
    inject_lora(model, names, case)
    for module in model.modules():
        if case.init == "pissa" and isinstance(module, LoraLinear):
            module.start_from(module.lora_A.weight, module.lora_B.weight)
    freeze_base(model, saved)
    return model


@pytest.mark.parametrize("name", CASES)
def test_no_more_is_kept_than_peft_keeps(name: str) -> None:
    ours = build_ours(CASES[name][0])
    base = build()
    with torch.device("meta"):
        theirs = get_peft_model(base, CASES[name][1]())
    our_bytes, shapes = saved_bytes(ours)
    their_bytes, _ = saved_bytes(theirs)
    assert our_bytes > 1e6
    assert our_bytes <= their_bytes
    frozen = {p.shape for p in ours.parameters() if not p.requires_grad and p.ndim == 2}
    assert not frozen.intersection(shapes), "a copy of a frozen weight is kept"


def test_a_kept_copy_would_be_seen() -> None:
    """The measure works: a layer that goes through a merged weight keeps that weight."""
    model = build_ours(CASES["lora"][0])
    layer = model.get_submodule("bert.encoder.layer.1.attention.self.query")
    assert isinstance(layer, LoraLinear)

    def forward(x: torch.Tensor) -> torch.Tensor:
        return x @ (layer.weight + layer.lora_B.weight @ layer.lora_A.weight).T

    before, _ = saved_bytes(model)
    layer.forward = forward  # type: ignore[method-assign]
    after, shapes = saved_bytes(model)
    assert torch.Size([768, 768]) in shapes
    assert after > before

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from lora_cli.errors import UserError
from lora_cli.lora.inject import freeze_base, inject_lora
from lora_cli.lora.settings import LoraSettings
from lora_cli.training.recompute import check_recompute, recompute_blocks

NAMES = [
    f"bert.encoder.layer.{layer}.attention.self.{name}"
    for layer in range(3)
    for name in ("query", "value")
]


def build(*, recompute: bool, dropout: float = 0.0) -> nn.Module:
    """Return a model with frozen embeddings and adapters whose B is not zero."""
    torch.manual_seed(0)
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=30,
            hidden_size=16,
            num_hidden_layers=3,
            num_attention_heads=2,
            intermediate_size=32,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
        )
    )
    inject_lora(model, NAMES, LoraSettings(r=2, alpha=4.0, dropout=dropout))
    freeze_base(model, ("classifier",))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    if recompute:
        recompute_blocks(model)
    return model.train()


def gradients(model: nn.Module) -> tuple[dict[str, torch.Tensor], int]:
    """Return the gradients of a loss, and the bytes that autograd kept for them."""
    kept: dict[tuple[int, int], int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, nn.Parameter):
            kept[tensor.data_ptr(), tensor.numel()] = tensor.nbytes
        return tensor

    torch.manual_seed(1)
    ids = torch.arange(24).reshape(4, 6)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(input_ids=ids).logits.square().sum()
        kept_forward = sum(kept.values())
    loss.backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert all(gradient is not None for gradient in found.values())
    return {
        name: gradient for name, gradient in found.items() if gradient is not None
    }, kept_forward


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradients_are_the_same_from_less_memory(dropout: float) -> None:
    expected, much = gradients(build(recompute=False, dropout=dropout))
    found, little = gradients(build(recompute=True, dropout=dropout))
    assert len([name for name in found if "lora_" in name]) == 2 * len(NAMES)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-6, atol=1e-6)
        assert bool(gradient.any())
    assert little < much / 3


def test_models_that_cannot_are_refused() -> None:
    check_recompute(build(recompute=False))
    model = SimpleNamespace(
        supports_gradient_checkpointing=False, config=SimpleNamespace(model_type="odd")
    )
    with pytest.raises(UserError, match="must be false for odd"):
        recompute_blocks(model)

"""Merging in one process, where nothing is spread; `test_sharding.py` does it in two."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from lora_cli.lora.inject import freeze_base, inject_lora
from lora_cli.lora.layer import AdapterLayer, SharedTensors
from lora_cli.lora.merge import merge_lora
from lora_cli.lora.settings import LoraSettings
from lora_cli.training.sharded_merge import merge_sharded, round_trained


class _Model(nn.Module):
    """Layers of several kinds, one of them under two names."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(5, 4)
        self.conv = nn.Conv1d(4, 4, 3, padding=1, groups=2)
        self.plain = nn.Linear(4, 4, bias=False)
        self.again = self.plain
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.conv(self.table(ids).transpose(1, 2)).transpose(1, 2)
        y: torch.Tensor = self.attention(x, x, x)[0]
        return self.again(y) + self.plain(x)

    # What `fully_shard` adds to a module.
    def set_reshard_after_forward(self, _: bool) -> None:
        """Mark this as a unit."""

    def unshard(self) -> None:
        """Do nothing."""

    def reshard(self) -> None:
        """Do nothing."""


NAMES = ("table", "conv", "plain", "attention")
IDS = torch.tensor([[0, 1, 2], [3, 4, 0]])


@pytest.mark.parametrize(
    ("names", "settings"),
    [
        (NAMES, LoraSettings(r=2, alpha=4.0)),
        (("plain",), LoraSettings(r=2, alpha=4.0, lora_bias=True)),
        (("plain",), LoraSettings(r=2, alpha=4.0, variant="vera", d_initial=0.3)),
    ],
)
def test_merged_as_a_whole_model_is(names: tuple[str, ...], settings: LoraSettings) -> None:
    model: Any = _Model()
    inject_lora(model, names, settings)
    freeze_base(model, ())
    model.again = model.plain
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.5)
    model.eval()
    before, other = model(IDS), copy.deepcopy(model)
    merge_lora(other)
    merge_sharded(model)
    assert not any(isinstance(m, AdapterLayer | SharedTensors) for m in model.modules())
    assert torch.equal(model(IDS), other(IDS))
    torch.testing.assert_close(model(IDS), before, rtol=1e-4, atol=1e-5)
    assert model.again is model.plain


def test_nothing_to_merge() -> None:
    with pytest.raises(ValueError, match="must hold LoRA layers"):
        merge_sharded(_Model())


def test_what_is_trained_is_rounded_and_keeps_its_format() -> None:
    model = nn.Linear(4, 4).requires_grad_(False)
    model.bias.requires_grad_(True)
    weight, bias = model.weight.clone(), model.bias.clone()
    round_trained(model, {"weight": torch.bfloat16, "bias": torch.bfloat16})
    assert torch.equal(model.weight, weight)
    assert model.bias.dtype == torch.float32
    assert torch.equal(model.bias, bias.bfloat16().float())
    assert not torch.equal(model.bias, bias)

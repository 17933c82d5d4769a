"""What merging does to each tensor of a layer, against the layer's own merge."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_cli.lora.adalora import AdaLoraLinear
from lora_cli.lora.attention import LoraAttention
from lora_cli.lora.conv import LoraConv
from lora_cli.lora.dora import DoraEmbedding, DoraLinear
from lora_cli.lora.embedding import LoraEmbedding
from lora_cli.lora.layer import AdapterLayer
from lora_cli.lora.linear import LoraLinear
from lora_cli.lora.lora_fa import LoraFaLinear
from lora_cli.lora.parameter import LoraParameter
from lora_cli.lora.settings import LoraSettings
from lora_cli.lora.tensor_changes import NoChangeError, changes_of
from lora_cli.lora.tokens import TokenEmbedding
from lora_cli.lora.vera import VeraLinear, share_factors


class Experts(nn.Module):
    """Stacks of matrices, as the experts of a mixture are."""

    def __init__(self, *, is_transposed: bool = False) -> None:
        super().__init__()
        self.is_transposed = is_transposed
        self.up = nn.Parameter(torch.randn(3, 8, 6))
        self.gate = nn.Parameter(torch.randn(3, 8, 6))


def stacked(**options: bool) -> AdapterLayer:
    inner = LoraParameter(Experts(**options), "up", r=2, alpha=4)
    return LoraParameter(inner, "gate", r=2, alpha=4)


def vera() -> AdapterLayer:
    layer = VeraLinear(nn.Linear(6, 8), r=4)
    layer.shared_in = nn.Module()  # holds the shared factors, for this test to find
    share_factors(layer.shared_in, [layer], LoraSettings(r=4, alpha=4, variant="vera"))
    return layer


LAYERS: dict[str, Callable[[], AdapterLayer]] = {
    "linear": lambda: LoraLinear(nn.Linear(6, 8), r=2, alpha=4),
    "rslora": lambda: LoraLinear(nn.Linear(6, 8), r=2, alpha=4, rslora=True),
    "conv1d": lambda: LoraLinear(Conv1D(8, 6), r=2, alpha=4),
    "frozen A": lambda: LoraFaLinear(nn.Linear(6, 8), r=2, alpha=4),
    "dora": lambda: DoraLinear(nn.Linear(6, 8), r=2, alpha=4),
    "embedding": lambda: LoraEmbedding(nn.Embedding(9, 6), r=2, alpha=4),
    "conv": lambda: LoraConv(nn.Conv2d(3, 8, 2), r=2, alpha=4),
    "adalora": lambda: AdaLoraLinear(nn.Linear(6, 8), r=2, alpha=4),
    "vera": vera,
    "tokens": lambda: TokenEmbedding(nn.Embedding(9, 6), [7, 2]),
    "experts": stacked,
    "transposed experts": lambda: stacked(is_transposed=True),
    "attention": lambda: LoraAttention(nn.MultiheadAttention(8, 2), r=2, alpha=4),
}


def own_tensors(layer: AdapterLayer) -> dict[str, torch.Tensor]:
    found = {}
    for name, module in layer.named_modules():
        if isinstance(module, AdapterLayer):
            path = f"block.{name}." if name else "block."
            found |= {f"{path}{leaf}": value for leaf, value in module.own_tensors().items()}
    return {name.removeprefix("block.shared_in."): value for name, value in found.items()}


@pytest.mark.parametrize("name", LAYERS)
def test_changes_are_those_of_the_layers_own_merge(name: str) -> None:
    torch.manual_seed(0)
    layer: Any = LAYERS[name]()
    with torch.no_grad():
        for parameter in layer.trained_parameters():
            parameter.add_(torch.randn(parameter.shape))
    shared = dict(layer.shared_in.named_buffers()) if name == "vera" else {}
    values = {key: value.detach() for key, value in {**own_tensors(layer), **shared}.items()}
    before = dict(layer.merged().named_parameters())
    base = {n.replace("base_layer.", ""): p for n, p in layer.named_parameters()}
    tokens = {"block": (7, 2)}
    changes = dict(changes_of(layer, "block", values.__getitem__, tokens))
    assert changes
    for path, change in changes.items():
        leaf = path.removeprefix("block.")
        old, expected = base[leaf].detach(), before[leaf]
        found = change.rows(old.reshape(len(old), -1), 0, len(old))
        assert torch.allclose(found, expected.reshape(len(old), -1), atol=1e-5), path
    assert len(changes) == (2 if name in ("experts", "transposed experts", "attention") else 1)


@pytest.mark.parametrize(
    ("layer", "why"),
    [
        (lambda: LoraLinear(nn.Linear(6, 8), r=2, alpha=4, lora_bias=True), "with a bias"),
        (lambda: DoraLinear(Conv1D(8, 6), r=2, alpha=4), "has lengths"),
        (lambda: DoraEmbedding(nn.Embedding(9, 6), r=2, alpha=4), "has lengths"),
        (lambda: LoraConv(nn.Conv2d(4, 8, 2, groups=2), r=2, alpha=4), "without groups"),
    ],
)
def test_what_needs_the_whole_layer_is_told(layer: Callable[[], AdapterLayer], why: str) -> None:
    made = layer()
    with pytest.raises(NoChangeError, match=why):
        dict(changes_of(made, "block", own_tensors(made).__getitem__, {}))

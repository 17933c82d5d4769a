from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.pytorch_utils import Conv1D

from lora_cli.lora.kinds import (
    add_in_float,
    dense_layer,
    dense_weight,
    is_conv1d,
    is_linear,
    kind_of,
    linear_sizes,
)

attention = nn.MultiheadAttention(4, 2)


class Linear4bit(nn.Linear):
    """A layer that is called as one of bitsandbytes, and is none."""


class Quantized(nn.Linear):
    pass


Quantized.__name__, Quantized.__module__ = "Linear8bitLt", "bitsandbytes.nn.modules"

KINDS = [
    (nn.Linear(2, 3), "linear"),
    (Linear4bit(2, 3), "linear"),
    (Quantized(2, 3), "quantized"),
    (attention.out_proj, None),
    (attention, "attention"),
    (Conv1D(3, 2), "conv1d"),
    (nn.Embedding(2, 3), "embedding"),
    (Gemma3TextScaledWordEmbedding(2, 3, 0), "embedding"),
    (nn.EmbeddingBag(2, 3), None),
    (nn.Conv1d(2, 3, 1), "conv"),
    (nn.Conv2d(2, 3, 1), "conv"),
    (nn.Conv3d(2, 3, 1), "conv"),
    (parametrizations.weight_norm(nn.Conv1d(2, 3, 1)), "conv"),
    (nn.ConvTranspose1d(2, 3, 1), None),
    (nn.Bilinear(2, 2, 2), None),
    (nn.LayerNorm(2), None),
    (nn.Sequential(nn.Linear(2, 2)), None),
]


@pytest.mark.parametrize(("module", "kind"), KINDS)
def test_kind(module: nn.Module, kind: str | None) -> None:
    assert kind_of(module) == kind
    assert is_linear(module) == (kind in ("linear", "conv1d", "quantized"))


def test_a_class_of_the_same_name_from_elsewhere_is_not_that_of_transformers() -> None:
    assert is_conv1d(Conv1D(2, 2))
    assert not is_conv1d(type("Conv1D", (nn.Linear,), {})(2, 2))


@pytest.mark.parametrize("make", [lambda: nn.Linear(4, 3), lambda: Conv1D(3, 4)])
def test_weights_in_one_layout(make: Any) -> None:
    layer = make()
    assert linear_sizes(layer) == (4, 3)
    weight = dense_weight(layer)
    assert weight.shape == (3, 4)
    assert weight.data_ptr() == layer.weight.data_ptr()
    x = torch.randn(5, 4)
    torch.testing.assert_close(layer(x), x @ weight.T + layer.bias)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", ["linear", "conv1d"])
def test_a_layer_with_another_weight(name: str, bias: bool) -> None:
    base: Any = nn.Linear(4, 3, bias=bias) if name == "linear" else Conv1D(3, 4)
    weight, extra = torch.randn(3, 4), torch.randn(3)
    layer = dense_layer(base.eval(), weight)
    more = dense_layer(base, weight, extra_bias=extra)
    x = torch.randn(5, 4)
    offset = 0 if base.bias is None else base.bias
    torch.testing.assert_close(layer(x), x @ weight.T + offset)
    torch.testing.assert_close(more(x), x @ weight.T + offset + extra)
    assert type(layer) is type(base)
    assert not layer.training
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    if base.bias is not None:
        assert layer.bias is not base.bias


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_sums_are_rounded_once(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight, delta = torch.randn(40, dtype=torch.float64).to(dtype), torch.randn(40)
    wide = torch.promote_types(dtype, torch.float32)
    found = add_in_float(weight, delta)
    assert found.dtype == dtype
    assert torch.equal(found, (weight.to(wide) + delta).to(dtype))
    # 1 + 2**-8 lies between two bfloat16; with 2**-20 more it is above the middle, and a delta
    # that was rounded first would not be.
    one = torch.ones(1, dtype=torch.bfloat16)
    assert add_in_float(one, torch.tensor([2**-8 + 2**-20])).item() == 1 + 2**-7
    assert add_in_float(one, torch.tensor([2**-8 - 2**-20])).item() == 1


def test_a_linear_layer_with_a_forward_of_its_own_is_left_alone() -> None:
    class Router(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).softmax(-1)

    assert kind_of(nn.Linear(2, 2)) == "linear"
    assert kind_of(Router(2, 2)) is None


def test_falcon_has_plain_linear_layers() -> None:
    from transformers.models.falcon.modeling_falcon import FalconLinear

    layer, x = FalconLinear(3, 2), torch.randn(4, 3)
    assert torch.allclose(layer(x), x @ layer.weight.T + layer.bias)
    assert kind_of(layer) == "linear"

"""Bottleneck adapters against plain NumPy algebra, and their places in every family."""

import math
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    BertConfig,
    BertForSequenceClassification,
    T5Config,
    T5ForSequenceClassification,
)
from transformers.pytorch_utils import Conv1D

from lora_cli.errors import UserError
from lora_cli.lora.blocks import block_of, stack_depths
from lora_cli.lora.bottleneck import (
    SUBLAYERS,
    BottleneckLayer,
    bottleneck_names,
    put_bottlenecks,
)
from lora_cli.lora.state import adapter_state

_ERF = np.vectorize(math.erf)


def gelu(z: np.ndarray) -> np.ndarray:
    return z * 0.5 * (1 + _ERF(z / math.sqrt(2)))


def gelu_slope(z: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + _ERF(z / math.sqrt(2))) + z * np.exp(-z * z / 2) / math.sqrt(2 * math.pi)


@given(
    inp=st.integers(1, 6),
    out=st.integers(1, 6),
    size=st.integers(1, 8),
    rows=st.integers(1, 4),
    seed=st.integers(0, 2**31),
)
def test_forward_and_gradients_are_the_formula(
    inp: int, out: int, size: int, rows: int, seed: int
) -> None:
    torch.manual_seed(seed)
    layer = BottleneckLayer(nn.Linear(inp, out), size=size)
    for parameter in (*layer.down.parameters(), *layer.up.parameters()):
        nn.init.normal_(parameter)
    x = torch.randn(rows, inp, requires_grad=True)
    upstream = torch.randn(rows, out)
    y = layer(x)
    y.backward(upstream)

    def array(tensor: torch.Tensor | None) -> np.ndarray:
        assert tensor is not None
        return tensor.detach().double().numpy()

    weight, bias = array(layer.base_layer.weight), array(layer.base_layer.bias)
    down, down_bias = array(layer.down.weight), array(layer.down.bias)
    up, up_bias = array(layer.up.weight), array(layer.up.bias)
    h = array(x) @ weight.T + bias
    z = h @ down.T + down_bias
    g = array(upstream)
    dz = (g @ up) * gelu_slope(z)
    expected = {
        "y": (y, h + gelu(z) @ up.T + up_bias),
        "up": (layer.up.weight.grad, g.T @ gelu(z)),
        "up bias": (layer.up.bias.grad, g.sum(0)),
        "down": (layer.down.weight.grad, dz.T @ h),
        "down bias": (layer.down.bias.grad, dz.sum(0)),
        "x": (x.grad, (g + dz @ down) @ weight),
    }
    for name, (found, wanted) in expected.items():
        scale = 1e-4 * (1 + np.abs(wanted).max())
        np.testing.assert_allclose(array(found), wanted, rtol=1e-3, atol=scale, err_msg=name)
    assert layer.base_layer.weight.grad is None


def test_a_new_layer_is_the_base_to_the_last_bit_in_any_precision() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        base = nn.Linear(5, 7).to(dtype)
        layer = BottleneckLayer(base, size=3)
        x = torch.randn(4, 5, dtype=dtype)
        assert torch.equal(layer(x), base(x))
        assert layer(x).dtype == dtype
        assert layer.down.weight.dtype == layer.up.weight.dtype == torch.float32


def test_the_width_of_a_conv1d_is_that_of_its_output() -> None:
    layer = BottleneckLayer(Conv1D(6, 4), size=2)
    assert layer(torch.randn(3, 4)).shape == (3, 6)
    assert layer.up.weight.shape == (6, 2)


def test_a_size_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="size must be at least 1"):
        BottleneckLayer(nn.Linear(2, 2), size=0)


@cache
def on_meta(family: str) -> nn.Module:
    with torch.device("meta"):
        model: nn.Module = AutoModel.from_config(AutoConfig.for_model(family))
    return model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", SUBLAYERS)
def test_every_block_of_a_family_gets_its_bottlenecks(family: str) -> None:
    model = on_meta(family)
    pfeiffer = bottleneck_names(model, "pfeiffer")
    houlsby = bottleneck_names(model, "houlsby")
    assert set(pfeiffer) < set(houlsby)
    stacks = {block_of(name).stack for name in houlsby}  # type: ignore[union-attr]
    for stack, depth in stack_depths(name for name, _ in model.named_modules()).items():
        if stack not in stacks:
            # Convolutions before the first block of speech models.
            assert "conv" in stack
            continue
        for names in (pfeiffer, set(houlsby) - set(pfeiffer)):
            found = {block_of(name).index for name in names if name.startswith(f"{stack}.")}  # type: ignore[union-attr]
            assert found == set(range(depth)), stack
    # All write to the stream between the blocks: one width, but for the stages of Swin.
    widths = {BottleneckLayer(model.get_submodule(n), size=1).up.out_features for n in houlsby}
    assert len(widths) == (4 if family == "swin" else 1)


def test_bert_and_t5_by_name() -> None:
    small = {"vocab_size": 20, "num_labels": 2}
    bert = BertForSequenceClassification(
        BertConfig(
            **small, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8
        )
    )
    assert put_bottlenecks(bert, size=3, placement="houlsby") == (
        "bert.encoder.layer.0.attention.output.dense",
        "bert.encoder.layer.0.output.dense",
        "bert.encoder.layer.1.attention.output.dense",
        "bert.encoder.layer.1.output.dense",
    )
    t5 = T5ForSequenceClassification(
        T5Config(
            **small,
            d_model=8,
            d_kv=4,
            d_ff=8,
            num_layers=1,
            num_heads=2,
            decoder_start_token_id=0,
        )
    ).eval()
    ids = torch.tensor([[2, 5, 1]])
    before = t5(ids).logits
    assert put_bottlenecks(t5, size=3, placement="houlsby") == (
        "transformer.encoder.block.0.layer.0.SelfAttention.o",
        "transformer.encoder.block.0.layer.1.DenseReluDense.wo",
        "transformer.decoder.block.0.layer.0.SelfAttention.o",
        "transformer.decoder.block.0.layer.1.EncDecAttention.o",
        "transformer.decoder.block.0.layer.2.DenseReluDense.wo",
    )
    assert torch.equal(t5(ids).logits, before)


def test_an_unknown_family_is_named_with_those_that_are_known() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(UserError) as caught:
        put_bottlenecks(model, size=2, placement="pfeiffer")
    problem = caught.value.problems[0]
    assert problem.id == "strategy.unknown-family"
    assert '"Sequential"' in problem.message
    assert "bert, " in (problem.allowed or "")
    assert adapter_state(model, ()).keys() == {"0.weight", "0.bias"}

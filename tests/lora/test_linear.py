"""LoraLinear against plain numpy algebra."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lora_cli.lora.linear import LoraLinear


def filled(
    *, out: int = 5, inp: int = 7, r: int = 3, alpha: float = 4.0, bias: bool = True, seed: int = 0
) -> LoraLinear:
    """A layer whose B is not zero."""
    torch.manual_seed(seed)
    layer = LoraLinear(nn.Linear(inp, out, bias=bias), r=r, alpha=alpha)
    nn.init.normal_(layer.lora_B.weight)
    return layer


def arrays(layer: LoraLinear) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    base = layer.base_layer
    bias = np.zeros(base.out_features) if base.bias is None else base.bias.double().numpy()
    parts = (base.weight, layer.lora_A.weight, layer.lora_B.weight)
    weight, a, b = (part.detach().double().numpy() for part in parts)
    return weight, bias, a, b


@settings(max_examples=30, deadline=None)
@given(
    out=st.integers(1, 9),
    inp=st.integers(1, 9),
    r=st.integers(1, 12),
    rows=st.integers(1, 4),
    alpha=st.floats(0.1, 64),
    bias=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_forward_gradient_and_merge_are_the_formula(
    out: int, inp: int, r: int, rows: int, alpha: float, bias: bool, seed: int
) -> None:
    layer = filled(out=out, inp=inp, r=r, alpha=alpha, bias=bias, seed=seed)
    x = torch.randn(rows, 2, inp)
    upstream = torch.randn(rows, 2, out)
    weight, offset, a, b = arrays(layer)
    flat = x.double().numpy().reshape(-1, inp)
    g = upstream.double().numpy().reshape(-1, out)
    scale = alpha / r

    y = layer(x)
    y.backward(upstream)
    merged = layer.merged()

    full = weight + scale * b @ a
    size = 1 + np.abs(full).max()
    close = {"rtol": 1e-4, "atol": 1e-5 * size}
    expected = (flat @ full.T + offset).reshape(rows, 2, out)
    np.testing.assert_allclose(y.detach().numpy(), expected, **close)
    np.testing.assert_allclose(merged(x).detach().numpy(), expected, **close)
    np.testing.assert_allclose(merged.weight.numpy(), full, **close)
    grad_b = scale * g.T @ (flat @ a.T)
    grad_a = scale * (g @ b).T @ flat
    for parameter, grad in ((layer.lora_B.weight, grad_b), (layer.lora_A.weight, grad_a)):
        assert parameter.grad is not None
        np.testing.assert_allclose(
            parameter.grad.numpy(), grad, rtol=1e-4, atol=1e-5 * (1 + np.abs(grad).max())
        )
    assert layer.base_layer.weight.grad is None


def test_start_is_the_base_and_a_is_kaiming_uniform() -> None:
    torch.manual_seed(3)
    base = nn.Linear(4096, 16)
    layer = LoraLinear(base, r=8, alpha=16.0)
    x = torch.randn(3, 4096)
    assert torch.equal(layer(x), base(x))
    assert layer.scale == 2.0
    a = layer.lora_A.weight
    bound = 1 / 4096**0.5  # sqrt(6 / ((1 + 5) * fan_in))
    assert a.abs().max() <= bound
    assert a.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)


def test_same_seed_same_start() -> None:
    def start() -> torch.Tensor:
        base = nn.Linear(6, 4)
        torch.manual_seed(11)
        return LoraLinear(base, r=2, alpha=2.0).lora_A.weight

    assert torch.equal(start(), start())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_base(dtype: torch.dtype) -> None:
    layer = filled()
    exact_weight = layer.merged().weight
    layer.base_layer.to(dtype)
    x = torch.randn(4, 7).to(dtype)
    assert layer.lora_A.weight.dtype == layer.lora_B.weight.dtype == torch.float32
    y = layer(x)
    assert y.dtype == dtype
    # The update itself is computed in float32: only the base and the final sum are rounded.
    update = (layer.lora_B.weight @ layer.lora_A.weight @ x.float().T).T * layer.scale
    assert torch.equal(y, (layer.base_layer(x) + update).to(dtype)) or torch.allclose(
        y.float(), layer.base_layer(x).float() + update, rtol=torch.finfo(dtype).eps
    )
    merged = layer.merged()
    assert merged.weight.dtype == merged.bias.dtype == dtype
    delta = (layer.lora_B.weight @ layer.lora_A.weight) * layer.scale
    assert torch.equal(merged.weight, (layer.base_layer.weight.float() + delta).to(dtype))
    assert torch.allclose(merged.weight.float(), exact_weight, atol=0.05)


def test_update_smaller_than_base_rounding_is_not_computed_in_low_precision() -> None:
    # 1 + 2**-9 is not a bfloat16: an update computed there would be 1 times 1.
    layer = LoraLinear(nn.Linear(1, 1, bias=False), r=1, alpha=1.0)
    with torch.no_grad():
        layer.base_layer.weight.zero_()
        layer.lora_A.weight.fill_(1 + 2**-9)
        layer.lora_B.weight.fill_(1 / (1 + 2**-9) * 256)
    layer.base_layer.to(torch.bfloat16)
    assert layer(torch.ones(1, 1, dtype=torch.bfloat16)).item() == 256.0


def test_autocast() -> None:
    layer = filled()
    x = torch.randn(4, 7)
    exact = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        merged = layer.merged()
    assert y.dtype == torch.bfloat16
    assert torch.allclose(y.float(), exact, rtol=0.03, atol=0.05)
    assert torch.equal(merged.weight, layer.merged().weight)
    y.float().sum().backward()
    assert layer.lora_B.weight.grad is not None
    assert layer.lora_B.weight.grad.dtype == torch.float32


def test_merged_leaves_the_layer_alone() -> None:
    layer = filled().eval()
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    first, second = layer.merged(), layer.merged()
    assert torch.equal(first.weight, second.weight)
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert type(first) is nn.Linear
    assert not first.training
    assert first.bias.data_ptr() != layer.base_layer.bias.data_ptr()
    assert filled(bias=False).merged().bias is None


def test_dropout_acts_on_the_update_in_training_only() -> None:
    torch.manual_seed(0)
    base = nn.Linear(400, 2).eval()
    layer = LoraLinear(base, r=400, alpha=400.0, dropout=0.5)
    assert not layer.training
    with torch.no_grad():
        layer.lora_A.weight.copy_(torch.eye(400))
        nn.init.ones_(layer.lora_B.weight)
    x = torch.ones(1, 400)
    assert torch.equal(layer(x), layer(x))
    layer.train()
    update = (layer(x) - base(x))[0, 0].item()
    # 400 coins, each 0 or 2: mean 400, standard deviation 20.
    assert update != 400.0
    assert update == pytest.approx(400.0, abs=100)
    assert update % 2 == pytest.approx(0.0, abs=1e-3) or update % 2 == pytest.approx(2.0, abs=1e-3)


def test_base_is_kept_and_frozen() -> None:
    base = nn.Linear(3, 2)
    layer = LoraLinear(base, r=1, alpha=1.0)
    assert layer.base_layer is base
    assert [n for n, p in layer.named_parameters() if p.requires_grad] == [
        "lora_A.weight",
        "lora_B.weight",
    ]
    assert layer.weight is base.weight
    assert layer.bias is base.bias


@pytest.mark.parametrize("r", [0, -1])
def test_rank_below_one(r: int) -> None:
    with pytest.raises(ValueError, match="r must be at least 1"):
        LoraLinear(nn.Linear(2, 2), r=r, alpha=1.0)


@pytest.mark.parametrize("dropout", [1.0, -0.1, float("nan")])
def test_dropout_out_of_range(dropout: float) -> None:
    with pytest.raises(ValueError, match="dropout"):
        LoraLinear(nn.Linear(2, 2), r=1, alpha=1.0, dropout=dropout)

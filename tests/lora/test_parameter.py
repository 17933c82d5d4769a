"""LoraParameter against plain numpy algebra, written expert by expert."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lora_cli.lora.parameter import LoraParameter, with_parameters

Array = np.ndarray[Any, np.dtype[np.float64]]


class Stack(nn.Module):
    """Two stacks of matrices, the first applied to the input and the second to that."""

    def __init__(self, experts: int, inp: int, mid: int, out: int, *, transposed: bool) -> None:
        super().__init__()
        self.is_transposed = transposed
        first, second = (inp, mid), (mid, out)
        if not transposed:
            first, second = first[::-1], second[::-1]
        self.up = nn.Parameter(torch.randn(experts, *first))
        self.down = nn.Parameter(torch.randn(experts, *second))
        self.register_buffer("offset", torch.randn(out))

    def forward(self, x: torch.Tensor, *, flip: bool = False) -> torch.Tensor:
        for weight in (self.up, self.down):
            x = x @ (weight if self.is_transposed else weight.mT)
        return -(x + self.offset) if flip else x + self.offset


class Router(nn.Module):
    """One matrix that no layer holds."""

    def __init__(self, inp: int, out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out, inp))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.T


def filled(layer: LoraParameter) -> LoraParameter:
    with torch.no_grad():
        layer.lora_B.weight.normal_()
    return layer.double()


def array(tensor: torch.Tensor) -> Array:
    return tensor.detach().double().numpy()


def updates(layer: LoraParameter, *, experts: int, r: int, scale: float) -> list[Array]:
    """What each matrix gets, (out, in), from the factors as PEFT 0.21 lays them out in a file."""
    a, b = array(layer.lora_A.weight), array(layer.lora_B.weight)
    rows = [a[e * r : (e + 1) * r] for e in range(experts)]
    columns = [np.stack([b[:, k * experts + e] for k in range(r)], axis=1) for e in range(experts)]
    return [scale * column @ row for column, row in zip(columns, rows, strict=True)]


def numeric_gradient(function: Callable[[], float], values: torch.Tensor) -> Array:
    """Central differences, in float64."""
    flat, step = values.detach().view(-1), 1e-6
    found = []
    for index in range(flat.numel()):
        kept = flat[index].item()
        flat[index] = kept + step
        above = function()
        flat[index] = kept - step
        below = function()
        flat[index] = kept
        found.append((above - below) / (2 * step))
    return np.array(found).reshape(values.shape)


@given(
    experts=st.integers(1, 4),
    inp=st.integers(1, 5),
    mid=st.integers(1, 5),
    out=st.integers(1, 5),
    r=st.integers(1, 3),
    alpha=st.floats(0.1, 8),
    transposed=st.booleans(),
    rslora=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_stack_of_experts_is_the_formula(
    experts: int,
    inp: int,
    mid: int,
    out: int,
    r: int,
    alpha: float,
    transposed: bool,
    rslora: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    base = Stack(experts, inp, mid, out, transposed=transposed).double()
    weights = [array(base.up), array(base.down)]
    if transposed:
        weights = [weight.transpose(0, 2, 1) for weight in weights]
    settings = {"r": r, "alpha": alpha, "rslora": rslora}
    inner = filled(LoraParameter(base, "up", **settings))
    outer = filled(LoraParameter(inner, "down", **settings))
    assert inner.lora_A.weight.shape == (r * experts, inp)
    assert inner.lora_B.weight.shape == (mid, r * experts)
    assert outer.lora_A.weight.shape == (r * experts, mid)
    assert outer.lora_B.weight.shape == (out, r * experts)

    scale = alpha / np.sqrt(r) if rslora else alpha / r
    full = [
        [w + d for w, d in zip(weight, updates(layer, experts=experts, r=r, scale=scale), strict=1)]
        for weight, layer in zip(weights, (inner, outer), strict=True)
    ]
    x = torch.randn(experts, 3, inp, dtype=torch.float64)
    expected = np.stack(
        [array(x)[e] @ full[0][e].T @ full[1][e].T + array(base.offset) for e in range(experts)]
    )
    close = {"rtol": 1e-9, "atol": 1e-9}
    np.testing.assert_allclose(array(outer(x)), expected, **close)
    np.testing.assert_allclose(array(outer(x, flip=True)), -expected, **close)

    merged = outer.merged()
    assert type(merged) is Stack
    np.testing.assert_allclose(array(merged(x)), expected, **close)
    for name, layer, found in (("up", inner, full[0]), ("down", outer, full[1])):
        value = getattr(merged, name)
        layout = np.stack(found).transpose(0, 2, 1) if transposed else np.stack(found)
        np.testing.assert_allclose(array(value), layout, **close)
        assert isinstance(value, nn.Parameter)
        assert not value.requires_grad
        delta = array(layer.delta_weight())
        np.testing.assert_allclose(delta, layout - array(getattr(base, name)), rtol=1e-6, atol=1e-6)
    # Nothing was merged into the layers themselves.
    np.testing.assert_allclose(array(outer(x)), expected, **close)


@given(
    inp=st.integers(1, 6), out=st.integers(1, 6), r=st.integers(1, 4), seed=st.integers(0, 2**31)
)
def test_matrix_is_the_formula(inp: int, out: int, r: int, seed: int) -> None:
    torch.manual_seed(seed)
    base = Router(inp, out).double()
    layer = filled(LoraParameter(base, "weight", r=r, alpha=3.0))
    full = array(base.weight) + 3 / r * array(layer.lora_B.weight) @ array(layer.lora_A.weight)
    x = torch.randn(4, inp, dtype=torch.float64)
    np.testing.assert_allclose(array(layer(x)), array(x) @ full.T, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(array(layer.merged().weight), full, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("transposed", [False, True])
def test_gradients_are_those_of_finite_differences(transposed: bool) -> None:
    torch.manual_seed(0)
    base = Stack(3, 4, 2, 3, transposed=transposed).double()
    layer = filled(
        LoraParameter(filled(LoraParameter(base, "up", r=2, alpha=3.0)), "down", r=1, alpha=3.0)
    )
    x = torch.randn(3, 2, 4, dtype=torch.float64)

    def loss() -> torch.Tensor:
        return (layer(x) ** 2).sum()

    trained = [*layer.base_layer.trained_parameters(), *layer.trained_parameters()]
    assert len(trained) == 4
    for parameter in trained:
        parameter.requires_grad_(True)
    loss().backward()
    with torch.no_grad():
        for parameter in trained:
            expected = numeric_gradient(lambda: loss().item(), parameter.data)
            assert parameter.grad is not None
            np.testing.assert_allclose(array(parameter.grad), expected, rtol=1e-5, atol=1e-6)
    assert base.up.grad is None
    assert base.down.grad is None


def test_start_is_the_base() -> None:
    torch.manual_seed(0)
    base = Stack(3, 5, 4, 2, transposed=False)
    x = torch.randn(3, 2, 5)
    expected = base(x)
    layer = LoraParameter(LoraParameter(base, "up", r=2, alpha=4.0), "down", r=2, alpha=4.0)
    assert torch.equal(layer(x), expected)
    a = layer.base_layer.lora_A.weight
    assert 0 < a.abs().max() <= 1 / 5**0.5  # sqrt(6 / ((1 + 5) * fan_in)), as for one layer


def test_what_is_saved_and_trained() -> None:
    base = Stack(3, 5, 4, 2, transposed=False)
    inner = LoraParameter(base, "up", r=2, alpha=4.0, freeze_A=True)
    outer = LoraParameter(inner, "down", r=2, alpha=4.0)
    assert list(outer.own_tensors()) == ["lora_A.weight", "lora_B.weight"]
    assert all(value.dtype == torch.float32 for value in outer.own_tensors().values())
    assert [id(p) for p in outer.trained_parameters()] == [
        id(p) for p in (outer.lora_A.weight, outer.lora_B.weight)
    ]
    assert [id(p) for p in inner.trained_parameters()] == [id(inner.lora_B.weight)]


def test_attributes_are_those_of_the_module_and_the_parameter_has_its_update() -> None:
    torch.manual_seed(0)
    base = Stack(2, 3, 3, 3, transposed=True)
    inner = filled(LoraParameter(base, "up", r=1, alpha=1.0))
    outer = LoraParameter(inner, "down", r=1, alpha=1.0)
    assert outer.is_transposed is True
    assert torch.equal(outer.offset, base.offset)
    assert torch.equal(outer.up, base.up + inner.delta_weight())
    assert not torch.equal(outer.up, base.up)
    assert torch.equal(outer.down, base.down)
    with pytest.raises(AttributeError, match="sideways"):
        outer.sideways  # noqa: B018
    assert torch.equal(copy.deepcopy(outer).up, outer.up)


def test_low_precision_base_is_rounded_once_when_merged() -> None:
    torch.manual_seed(0)
    layer = LoraParameter(Stack(2, 8, 8, 8, transposed=False).bfloat16(), "up", r=2, alpha=3.0)
    with torch.no_grad():
        layer.lora_B.weight.normal_(std=0.1)
    assert layer.lora_A.weight.dtype == layer.lora_B.weight.dtype == torch.float32
    x = torch.randn(2, 3, 8, dtype=torch.bfloat16)
    assert layer(x).dtype == torch.bfloat16
    deltas = np.stack(updates(layer, experts=2, r=2, scale=1.5))
    exact = torch.from_numpy(array(layer.base_layer.up) + deltas)
    merged = layer.merged()
    assert merged.up.dtype == torch.bfloat16
    wrong = merged.up != exact.to(torch.bfloat16)
    # float32 instead of float64 sums may fall on the other side of a tie.
    assert wrong.float().mean() < 0.01
    torch.testing.assert_close(merged(x).float(), layer(x).float(), rtol=0.05, atol=0.2)


def test_autocast_does_not_round_the_parameter() -> None:
    torch.manual_seed(0)
    layer = LoraParameter(Router(8, 8), "weight", r=2, alpha=3.0)
    with torch.no_grad():
        layer.lora_B.weight.normal_()
    expected = layer.adapted()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer.adapted(), expected)
        torch.testing.assert_close(layer.merged().weight.data, expected.data)


def test_saves_no_more_than_the_adapted_parameter_and_the_factors() -> None:
    torch.manual_seed(0)
    base = Stack(4, 16, 16, 16, transposed=False)
    layer = LoraParameter(base, "up", r=2, alpha=3.0)
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    x = torch.randn(4, 3, 16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = layer(x)
    frozen = {base.up.data_ptr(), base.down.data_ptr()}
    allowed = base.up.nbytes + x.nbytes * 2
    allowed += layer.lora_A.weight.nbytes + layer.lora_B.weight.nbytes
    assert sum(size for place, size in saved.items() if place not in frozen) <= allowed
    output.sum().backward()
    # The module holds its own parameter again, not the sum.
    assert torch.equal(layer.base_layer.up, base.up)
    assert isinstance(layer.base_layer.up, nn.Parameter)


def test_module_keeps_its_parameter_when_its_call_fails() -> None:
    layer = LoraParameter(Router(3, 3), "weight", r=1, alpha=1.0)
    before = layer.base_layer.weight
    with pytest.raises(RuntimeError):
        layer(torch.ones(2, 4))
    assert layer.base_layer.weight is before


@pytest.mark.parametrize("shape", [(3,), (2, 2, 2, 2)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    base = nn.Module()
    base.weight = nn.Parameter(torch.zeros(shape))
    with pytest.raises(ValueError, match=f"two or three dimensions, but has {len(shape)}"):
        LoraParameter(base, "weight", r=1, alpha=1.0)


def test_rank_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="r must be at least 1, but is 0"):
        LoraParameter(Router(2, 2), "weight", r=0, alpha=1.0)


def test_module_with_other_parameters_shares_the_rest() -> None:
    base = Stack(2, 3, 3, 3, transposed=True)
    twin = with_parameters(base, {"up": torch.zeros(2, 3, 3)})
    assert twin.down is base.down
    assert twin.offset is base.offset
    assert twin.up.count_nonzero() == 0
    assert base.up.count_nonzero() == 18

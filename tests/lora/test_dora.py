"""DoRA: lengths, starts from the base weight, dropout, and what is formed and kept."""

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional

from lora_cli.lora import dora
from lora_cli.lora.dora import DoraConv, DoraEmbedding, DoraLinear
from lora_cli.lora.inject import freeze_base
from lora_cli.lora.state import adapter_state, load_adapter_state


def _sibling(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        f"dora_{name}", Path(__file__).with_name(f"{name}.py")
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


algebra, support = _sibling("algebra"), _sibling("layer_support")


@settings(max_examples=25, deadline=None)
@given(
    out=st.integers(1, 7),
    inp=st.integers(1, 7),
    r=st.integers(1, 9),
    alpha=st.floats(0.1, 32),
    bias=st.booleans(),
    rslora=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_linear_layers_of_any_size_are_the_formula(
    out: int, inp: int, r: int, alpha: float, bias: bool, rslora: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    layer = DoraLinear(nn.Linear(inp, out, bias=bias), r=r, alpha=alpha, rslora=rslora).double()
    support.shake(layer)
    x = torch.randn(2, 3, inp, dtype=torch.float64)
    truth = algebra.compare(layer, x, scale=alpha / (r**0.5 if rslora else r), tolerance=1e-9)
    np.testing.assert_allclose(algebra.array(layer.norms()), truth.norms, rtol=1e-9)


def test_magnitude_starts_as_the_lengths_in_the_shapes_of_peft() -> None:
    torch.manual_seed(0)
    linear, table, conv = nn.Linear(5, 4), nn.Embedding(9, 3), nn.Conv3d(2, 6, (1, 2, 3))
    lengths = {
        DoraLinear(linear, r=2, alpha=2.0): linear.weight.norm(dim=1),
        DoraEmbedding(table, r=2, alpha=2.0): table.weight.norm(dim=0),
        DoraConv(conv, r=2, alpha=2.0): conv.weight.flatten(1).norm(dim=1).view(1, 6, 1, 1, 1),
    }
    for layer, expected in lengths.items():
        torch.testing.assert_close(layer.lora_magnitude_vector.data, expected.data)


def test_the_length_has_no_gradient() -> None:
    """Section 4.3: A's gradient is that of the formula with the lengths held still."""
    torch.manual_seed(1)
    layer: Any = DoraLinear(nn.Linear(4, 3), r=2, alpha=2.0).double()
    support.shake(layer)
    x = torch.randn(5, 4, dtype=torch.float64)
    layer(x).square().sum().backward()
    still, step = layer.norms(), 1e-6
    W, A, B = (tensor.detach() for tensor in layer.matrices())

    def loss(A: torch.Tensor, lengths: torch.Tensor | None) -> torch.Tensor:
        V = W + B @ A
        f = layer.lora_magnitude_vector.detach() / (V.norm(dim=1) if lengths is None else lengths)
        output: torch.Tensor = f * (x @ V.T) + layer.bias
        return output.square().sum()

    shift = torch.zeros_like(A)
    shift[1, 2] = step
    held, moving = (
        (loss(A + shift, lengths) - loss(A - shift, lengths)) / (2 * step)
        for lengths in (still, None)
    )
    assert layer.lora_A.weight.grad is not None
    assert layer.lora_A.weight.grad[1, 2].item() == pytest.approx(held.item(), rel=1e-6)
    assert abs(held - moving) > 1e-3 * abs(held)


@pytest.mark.parametrize("kind", ["linear", "conv1d-transformers", "conv1d", "conv2d"])
def test_dropout_is_on_the_update_only(kind: str) -> None:
    layer = support.adapt(support.CASES[kind], "dora", dropout=0.5)
    x = support.CASES[kind].inputs()
    torch.manual_seed(4)
    found = algebra.places(layer.base_layer, layer.train()(x))
    torch.manual_seed(4)
    dropped = functional.dropout(x, 0.5)
    W = algebra.matrix(layer.base_layer)
    A, B = (
        algebra.array(t).reshape(len(t), -1) for t in (layer.lora_A.weight, layer.lora_B.weight)
    )
    V = W + layer.scale * B @ A
    f = algebra.array(layer.lora_magnitude_vector).reshape(-1) / np.sqrt((V**2).sum(1))
    X, X_dropped = (algebra.rows(layer.base_layer, t) for t in (x, dropped))
    wanted = f * (X @ W.T + layer.scale * X_dropped @ A.T @ B.T) + algebra.array(layer.bias)
    np.testing.assert_allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_start_from_the_base_weight(init: Any, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    base = nn.Linear(8, 6).to(dtype)
    config = LoraConfig(
        r=2, lora_alpha=4, target_modules=["layer"], use_dora=True, init_lora_weights=init
    )
    holder = support.Holder(nn.Linear(8, 6).to(dtype))
    holder.layer.load_state_dict(base.state_dict())
    model: Any = get_peft_model(holder, config)
    theirs = model.base_model.model.layer
    layer = DoraLinear(base, r=2, alpha=4.0)
    start = theirs.lora_A.default.weight.clone(), theirs.lora_B.default.weight.clone()
    layer.start_from(*start)
    x = torch.randn(5, 8).to(dtype)
    torch.testing.assert_close(layer(x), base(x))
    torch.testing.assert_close(layer.norms(), layer.lora_magnitude_vector.data)
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(
        layer.lora_magnitude_vector, theirs.lora_magnitude_vector.default.weight, rtol=0.01, atol=0
    )
    move = [torch.randn(6, 2) * 0.3, torch.rand(6)]
    with torch.no_grad():
        layer.lora_B.weight.add_(move[0])
        theirs.lora_B.default.weight.add_(move[0])
        layer.lora_magnitude_vector.add_(move[1])
        theirs.lora_magnitude_vector.default.weight.add_(move[1])
    upstream = torch.randn(5, 6).to(dtype)
    found, wanted = layer(x), theirs(x)
    found.backward(upstream)
    wanted.backward(upstream)
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(
        layer.lora_A.weight.grad,
        theirs.lora_A.default.weight.grad,
        rtol=tolerance,
        atol=10 * tolerance,
    )
    plain: Any = layer.merged()
    torch.testing.assert_close(plain(x), found, rtol=tolerance, atol=tolerance)
    # In float64, with the start taken off the weight as the papers do.
    W = base.weight.double().detach()
    A0, B0 = (tensor.double().detach() for tensor in start)
    now = layer.lora_B.weight.double() @ layer.lora_A.weight.double()
    V = W - layer.scale * B0 @ A0 + layer.scale * now
    exact = layer.lora_magnitude_vector.double()[:, None] * V / V.norm(dim=1, keepdim=True)
    torch.testing.assert_close(plain.weight.double(), exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", ["linear", "embedding", "conv2d"])
def test_lengths_are_the_same_in_pieces(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = support.adapt(support.CASES[kind], "dora")
    whole = layer.norms()
    monkeypatch.setattr(dora, "_PIECE", 13)
    torch.testing.assert_close(layer.norms(), whole)


def test_no_more_than_a_piece_of_the_weight_is_formed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dora, "_PIECE", 100)
    layer = DoraEmbedding(nn.Embedding(500, 4).bfloat16(), r=2, alpha=2.0)
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.dtype == torch.float32:
                sizes.append(result.numel())
            return result

    with Watch():
        layer.norms()
    own = layer.lora_embedding_A.numel()
    assert 0 < max(size for size in sizes if size != own) <= 100


def test_a_row_of_zeros_stays_one_and_spoils_nothing() -> None:
    torch.manual_seed(0)
    base = nn.Linear(4, 3)
    with torch.no_grad():
        base.weight[1] = 0
    layer: Any = DoraLinear(base, r=2, alpha=2.0)
    x = torch.randn(5, 4)
    y = layer(x)
    assert torch.equal(y, base(x))
    y.sum().backward()
    for parameter in layer.trained_parameters():
        assert parameter.grad is not None
        assert torch.isfinite(parameter.grad).all()
    assert torch.equal(layer.merged().weight, base.weight)


def test_a_trained_bias_of_the_base_gets_its_gradient() -> None:
    layer = support.adapt(support.CASES["linear"], "dora")
    layer.base_layer.bias.requires_grad_(True)
    x = support.CASES["linear"].inputs()
    layer(x).sum().backward()
    torch.testing.assert_close(layer.base_layer.bias.grad, torch.full((5,), 6.0))


@pytest.mark.parametrize("kind", ["linear", "conv1d-transformers", "embedding", "conv2d"])
def test_one_activation_is_kept_for_the_magnitude(kind: str) -> None:
    case = support.CASES[kind]
    plain, layer = support.adapt(case, "lora"), support.adapt(case, "dora")
    x = case.inputs()
    y = layer(x)
    lora = support.kept_bytes(lambda: plain(x), plain, x)
    own = support.kept_bytes(lambda: layer(x), layer, x)
    vectors = 2 * layer.lora_magnitude_vector.numel()
    assert own <= lora + (y.numel() + vectors) * y.element_size()


def test_autocast() -> None:
    layer = support.adapt(support.CASES["linear"], "dora")
    x = support.CASES["linear"].inputs()
    exact, norms = layer(x), layer.norms()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        assert torch.equal(layer.norms(), norms)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), exact, rtol=0.03, atol=0.05)


def test_state_goes_round() -> None:
    holder = support.Holder(support.adapt(support.CASES["conv1d"], "dora"))
    freeze_base(holder, ())
    state = adapter_state(holder, ())
    assert set(state) == {
        "layer.lora_A.weight",
        "layer.lora_B.weight",
        "layer.lora_magnitude_vector",
    }
    torch.manual_seed(0)
    base = support.CASES["conv1d"].make()
    other = support.Holder(DoraConv(base, r=2, alpha=5.0))
    freeze_base(other, ())
    load_adapter_state(other, state, ())
    x = support.CASES["conv1d"].inputs()
    assert torch.equal(other(x), holder(x))

"""LoRA-FA: A is saved but not trained, and its gradient's activation is not kept."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from lora_cli.lora.inject import freeze_base, inject_lora, trainable_parameters
from lora_cli.lora.lora_fa import LoraFaConv, LoraFaLinear
from lora_cli.lora.settings import LoraSettings
from lora_cli.lora.state import adapter_state, load_adapter_state


def _sibling(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        f"lora_fa_{name}", Path(__file__).with_name(f"{name}.py")
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


support = _sibling("layer_support")
KINDS = ["linear", "linear-no-bias", "conv1d-transformers", "conv1d", "conv2d", "conv3d"]


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_lora_without_the_gradient_of_a(kind: str) -> None:
    case = support.CASES[kind]
    plain, layer = support.adapt(case, "lora"), support.adapt(case, "lora_fa")
    x, twin = case.inputs().requires_grad_(), case.inputs().requires_grad_()
    found, wanted = layer(x), plain(twin)
    assert torch.equal(found, wanted)
    found.square().sum().backward()
    wanted.square().sum().backward()
    torch.testing.assert_close(layer.lora_B.weight.grad, plain.lora_B.weight.grad)
    torch.testing.assert_close(x.grad, twin.grad)
    assert plain.lora_A.weight.grad.abs().max() > 0
    assert layer.lora_A.weight.grad is None
    assert torch.equal(layer.merged().weight, plain.merged().weight)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["linear", "conv1d-transformers"])
def test_only_the_projection_is_kept(kind: str, dtype: torch.dtype, dropout: float) -> None:
    case = support.CASES[kind]
    layer = support.adapt(case, "lora_fa", dtype=dtype, dropout=dropout).train()
    plain = support.adapt(case, "lora", dtype=dtype, dropout=dropout).train()
    # Nothing is passed as known input, so the input counts where it is kept.
    other = torch.empty(0)
    x = case.inputs(dtype)
    kept = support.kept_tensors(lambda: layer(x), layer, other)
    projection, inputs = 2 * 3 * 2, 2 * 3 * 7
    assert [(t.numel(), t.dtype) for t in kept] == [(projection, torch.float32)]
    wide = support.kept_tensors(lambda: plain(x), plain, other)
    assert inputs in [t.numel() for t in wide]
    # The gradient of the input needs the mask of the dropout besides, but no value of the input.
    x.requires_grad_()
    kept = support.kept_tensors(lambda: layer(x), layer, other)
    masks = [t for t in kept if t.numel() == inputs]
    assert len(masks) == (dropout > 0)
    assert len(kept) == 1 + len(masks)
    for mask in masks:
        assert mask.unique().numel() == 2


def test_patches_of_pixels_are_not_kept() -> None:
    case = support.CASES["conv2d-patches"]
    layer = support.adapt(case, "lora_fa")
    x = case.inputs()
    kept = support.kept_tensors(lambda: layer(x), layer, torch.empty(0))
    assert [tuple(t.shape) for t in kept] == [(2, 2, 2, 2)]


@pytest.mark.parametrize("make", [lambda: nn.Linear(4, 4), lambda: nn.Conv1d(4, 4, 3, padding=1)])
def test_a_is_saved_and_loaded_but_not_trained(make: object) -> None:
    def model(seed: int) -> nn.Module:
        torch.manual_seed(0)
        holder = support.Holder(make())  # type: ignore[operator]
        torch.manual_seed(seed)
        inject_lora(holder, ["layer"], LoraSettings(r=2, alpha=2.0, variant="lora_fa"))
        freeze_base(holder, ())
        return holder  # type: ignore[no-any-return]

    trained, other = model(1), model(2)
    assert isinstance(trained.layer, LoraFaLinear | LoraFaConv)
    assert list(trainable_parameters(trained)) == ["layer.lora_B.weight"]
    assert [id(p) for p in trained.layer.trained_parameters()] == [id(trained.layer.lora_B.weight)]
    start = trained.layer.lora_A.weight.clone()
    x = torch.randn(3, 4, 4)
    optimizer = torch.optim.SGD(trainable_parameters(trained).values(), lr=0.1)
    trained(x).square().sum().backward()
    optimizer.step()
    assert torch.equal(trained.layer.lora_A.weight, start)
    state = adapter_state(trained, ())
    assert set(state) == {"layer.lora_A.weight", "layer.lora_B.weight"}
    assert not torch.equal(other(x), trained(x))
    load_adapter_state(other, state, ())
    assert torch.equal(other(x), trained(x))
    # What was saved is an ordinary adapter.
    torch.manual_seed(0)
    plain = support.Holder(make())  # type: ignore[operator]
    inject_lora(plain, ["layer"], LoraSettings(r=2, alpha=2.0))
    freeze_base(plain, ())
    load_adapter_state(plain, state, ())
    assert torch.equal(plain(x), trained(x))

"""Adapters on layers of bitsandbytes, which has a CPU backend: numpy and dense twins decide."""

import copy
import logging
from typing import Any

import numpy as np
import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from lora_cli.lora.build import LAYERS, build_layer
from lora_cli.lora.inject import freeze_base, inject_lora
from lora_cli.lora.kinds import kind_of
from lora_cli.lora.merge import merge_lora
from lora_cli.lora.quantized import dequantized_weight, restore_weights
from lora_cli.lora.settings import AdaLoraSettings, LoraSettings
from lora_cli.lora.state import adapter_state, load_adapter_state
from lora_cli.lora.vera import share_factors
from lora_cli.models.quantization import quantize_base

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
Array = np.ndarray[Any, np.dtype[np.float64]]

KINDS = ("int8", "nf4")
# Table of QLoRA, arXiv:2305.14314, appendix E.
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


def quantized(
    kind: str, *, inp: int = 64, out: int = 48, bias: bool = True, dtype: Any = torch.float32
) -> tuple[Any, nn.Linear]:
    """A quantized layer, and a plain one with the weights that it stands for."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(inp, out, bias=bias).to(dtype))
    assert quantize_base(model, kind, keep=()).layers == 1
    layer: Any = model[0]
    twin = nn.Linear(inp, out, bias=bias)
    twin.weight = nn.Parameter(dequantized_weight(layer).to(dtype))
    if bias:
        twin.bias = nn.Parameter(layer.bias.detach().clone())
    return layer, twin


def test_int8_is_whole_numbers_times_the_largest_of_the_row() -> None:
    layer, _ = quantized("int8")
    layer_weight = layer.weight.data.double().numpy()
    largest = layer.weight.SCB.double().numpy()
    expected = layer_weight * largest[:, None] / 127
    np.testing.assert_allclose(dequantized_weight(layer).double().numpy(), expected, rtol=1e-6)
    # Forward moves the scales within the layer; the weight stays.
    before = dequantized_weight(layer)
    layer.train()(torch.randn(2, 64))
    assert layer.state.SCB is not None
    assert torch.equal(dequantized_weight(layer), before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(30, 7), (64, 48), (96, 65)])
def test_weight_is_near_the_one_that_was_quantized(kind: str, shape: tuple[int, int]) -> None:
    inp, out = shape
    torch.manual_seed(0)
    original = nn.Linear(inp, out).weight.detach().double().numpy()
    layer, _ = quantized(kind, inp=inp, out=out)
    found = dequantized_weight(layer).double().numpy()
    assert found.shape == (out, inp)
    if kind == "int8":
        # Half a step of 127 to the largest of the row, and float16 on the way.
        step = np.abs(original).max(axis=1, keepdims=True) / 127
        assert (np.abs(found - original) <= step * 0.5 + np.abs(original) * 1e-3).all()
        return
    blocks = np.pad(original.ravel(), (0, -original.size % 64)).reshape(-1, 64)
    largest = np.abs(blocks).max(axis=1, keepdims=True)
    table = np.array(NF4)
    nearest = table[np.abs(blocks[..., None] / largest[..., None] - table).argmin(axis=-1)]
    expected = (nearest * largest).ravel()[: original.size].reshape(original.shape)
    # The largest values of the blocks are kept in 8 bits themselves.
    np.testing.assert_allclose(found, expected, rtol=0.06)


@pytest.mark.parametrize("kind", KINDS)
def test_kind_and_sizes(kind: str) -> None:
    layer, _ = quantized(kind, bias=False)
    assert kind_of(layer) == "quantized"
    adapter: Any = build_layer(layer, "query", LoraSettings(r=3, alpha=6.0))
    assert adapter.lora_A.weight.shape == (3, 64)
    assert adapter.lora_B.weight.shape == (48, 3)
    assert adapter.lora_A.weight.dtype == torch.float32
    assert adapter.merged().bias is None


def adapter_on(base: nn.Module, variant: str) -> Any:
    """An adapter whose own tensors depend on the variant alone, none of them zero."""
    plan = AdaLoraSettings(init_r=4, total_steps=10) if variant == "adalora" else None
    settings = LoraSettings(r=4, alpha=8.0, variant=variant, adalora=plan)
    holder = nn.Sequential(base)
    torch.manual_seed(1)
    layer = build_layer(base, "0", settings)
    holder[0] = layer
    share_factors(holder, [layer], settings)
    for value in layer.trained_parameters():
        value.data += torch.randn(value.shape) * 0.1
        value.requires_grad_(True)
    return layer


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", sorted(LAYERS))
def test_trains_as_on_the_dense_twin(kind: str, variant: str) -> None:
    base, twin = quantized(kind)
    ours, theirs = adapter_on(base, variant), adapter_on(twin, variant)
    names = ours.own_tensors().keys()
    assert names == theirs.own_tensors().keys()
    x = torch.randn(3, 5, 64)
    upstream = torch.randn(3, 5, 48)
    inputs = x.clone().requires_grad_(True), x.clone().requires_grad_(True)
    found, expected = ours.train()(inputs[0]), theirs.train()(inputs[1])
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(found, expected, **close)
    found.backward(upstream)
    expected.backward(upstream)
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, **close)
    pairs = list(zip(ours.trained_parameters(), theirs.trained_parameters(), strict=True))
    assert pairs
    for mine, other in pairs:
        assert mine.grad is not None
        assert mine.grad.abs().max() > 0
        torch.testing.assert_close(mine.grad, other.grad, **close)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_merged_is_a_plain_layer_with_the_sum(kind: str, variant: str) -> None:
    base, twin = quantized(kind)
    ours, theirs = adapter_on(base, variant), adapter_on(twin, variant)
    merged = ours.merged()
    assert type(merged) is nn.Linear
    torch.testing.assert_close(merged.weight, theirs.merged().weight, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(merged.bias, twin.bias)
    assert kind_of(ours.base_layer) == "quantized"
    x = torch.randn(4, 64)
    torch.testing.assert_close(merged(x), ours.train()(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_still_passes_after_an_evaluation(kind: str) -> None:
    # On processors with bfloat16 units bitsandbytes would keep another layout from then on.
    base, twin = quantized(kind)
    ours, theirs = adapter_on(base, "lora"), adapter_on(twin, "lora")
    x = torch.randn(3, 64)
    with torch.no_grad():
        seen = ours.eval()(x)
    # 8-bit layers round their inputs as well when they do not train.
    torch.testing.assert_close(seen, theirs.eval()(x), rtol=0, atol=0.05)
    inputs = x.clone().requires_grad_(True), x.clone().requires_grad_(True)
    ours.train()(inputs[0]).sum().backward()
    theirs.train()(inputs[1]).sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_base(kind: str) -> None:
    base, twin = quantized(kind, dtype=torch.bfloat16)
    ours, theirs = adapter_on(base, "lora"), adapter_on(twin, "lora")
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    found = ours.train()(x)
    assert found.dtype == torch.bfloat16
    expected = theirs.train()(x)
    torch.testing.assert_close(found.float(), expected.float(), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_merging_goes_through_the_weights_before_quantization(kind: str) -> None:
    torch.manual_seed(0)
    whole = nn.Sequential(nn.Linear(64, 48), nn.Linear(48, 8)).train()
    model = copy.deepcopy(whole)
    quantize_base(model, kind, keep=())
    model[0] = adapter_on(model[0], "lora")
    a, b = (getattr(model[0], f"lora_{x}").weight.detach().numpy() for x in "AB")
    before = [layer.weight.detach().numpy() for layer in whole]
    trained = model[0].base_layer.bias.detach().clone() + 1
    model[0].base_layer.bias.data.copy_(trained)
    restore_weights(model, copy.deepcopy(whole))
    assert [kind_of(model[0].base_layer), kind_of(model[1])] == ["linear", "linear"]
    assert model[0].base_layer.training
    assert not any(value.requires_grad for value in model[1].parameters())
    merge_lora(model)
    assert torch.equal(model[0].bias, trained), "a bias that was trained is kept"
    np.testing.assert_allclose(model[0].weight.numpy(), before[0] + 2.0 * b @ a, rtol=1e-5)
    np.testing.assert_array_equal(model[1].weight.detach().numpy(), before[1])


@pytest.mark.parametrize("kind", KINDS)
def test_modules_trained_whole_hand_on_the_dtype_of_the_base(kind: str) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 8)).bfloat16()
    quantize_base(model, kind, keep=("1",))
    freeze_base(model, ("1",))
    assert model[1].weight.dtype == torch.float32
    assert model(torch.randn(2, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16


class Pair(nn.Module):
    """Two layers that PEFT takes for those of a quantized model."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 96), nn.Linear(96, 64)
        self.is_loaded_in_8bit = kind == "int8"
        self.is_loaded_in_4bit = kind == "nf4"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.second(torch.relu(self.first(x)))
        return found


def saved_bytes(model: Any, x: torch.Tensor) -> int:
    """Bytes of memory that one forward pass keeps for backward through the usual hooks."""
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


# Not DoRA on 8 bits: PEFT copies such layers for it without their scales, and cannot call them.
@pytest.mark.parametrize(("kind", "variant"), [("int8", "lora"), ("nf4", "lora"), ("nf4", "dora")])
def test_equal_to_peft(kind: str, variant: str) -> None:
    torch.manual_seed(0)
    model = Pair(kind)
    quantize_base(model, kind, keep=())
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=["first", "second"], use_dora=variant == "dora"
    )
    twin = get_peft_model(copy.deepcopy(model), config).train()
    inject_lora(model, ("first", "second"), LoraSettings(r=4, alpha=8.0, variant=variant))
    freeze_base(model, ())
    state = {
        name: value + torch.randn(value.shape) * 0.1
        for name, value in adapter_state(model, ()).items()
    }
    load_adapter_state(model.train(), state, ())
    theirs = peft.get_peft_model_state_dict(twin)
    named = {f"base_model.model.{name}": value for name, value in state.items()}
    assert {name: value.shape for name, value in theirs.items()} == {
        name: value.shape for name, value in named.items()
    }
    peft.set_peft_model_state_dict(twin, named)
    x, upstream = torch.randn(3, 5, 64), torch.randn(3, 5, 64)
    assert saved_bytes(model, x) <= saved_bytes(twin, x)
    found, expected = model(x), twin(x)
    assert (found - expected).abs().max() <= 1e-5
    found.backward(upstream)
    expected.backward(upstream)
    grads = {name: value.grad for name, value in model.named_parameters() if value.requires_grad}
    for name, value in twin.named_parameters():
        if value.requires_grad:
            short = name.removeprefix("base_model.model.").replace(".default", "")
            ours = grads[short.removesuffix(".weight") if "vector" in short else short]
            assert ours is not None
            torch.testing.assert_close(ours, value.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_layers_can_be_copied(kind: str) -> None:
    base, _ = quantized(kind)
    assert torch.equal(dequantized_weight(copy.deepcopy(base)), dequantized_weight(base))


def test_every_variant_that_adapts_linear_layers_adapts_quantized_ones() -> None:
    for variant, table in LAYERS.items():
        assert ("quantized" in table) == ("linear" in table), variant

"""What holds for every adapted layer: names, state, merging, attributes."""

import copy
import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lora_cli.lora.build import build_layer
from lora_cli.lora.inject import freeze_base, inject_lora
from lora_cli.lora.layer import AdapterLayer, TransparentLayer
from lora_cli.lora.linear import LoraLinear
from lora_cli.lora.merge import merge_lora
from lora_cli.lora.state import adapter_state, load_adapter_state


def _sibling(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        f"layer_{name}", Path(__file__).with_name(f"{name}.py")
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


support = _sibling("layer_support")
CASES, PAIRS = support.CASES, support.pairs()
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])


@settings(max_examples=120, deadline=None)
@given(
    pair=st.sampled_from(PAIRS),
    r=st.integers(1, 12),
    alpha=st.floats(0.1, 32),
    dtype=DTYPES,
    seed=st.integers(0, 2**31),
)
def test_state_goes_round_and_merging_is_the_forward_pass(
    pair: tuple[str, str], r: int, alpha: float, dtype: torch.dtype, seed: int
) -> None:
    kind, variant = pair

    def model(start: int) -> Any:
        torch.manual_seed(seed)
        holder = support.Holder(CASES[kind].make().to(dtype))
        torch.manual_seed(start)
        inject_lora(holder, ["layer"], support.settings_of(variant, r=r, alpha=alpha))
        freeze_base(holder, ())
        return holder

    trained, other = model(1), model(2)
    support.shake(trained.layer)
    state = adapter_state(trained, ())
    load_adapter_state(other, state, ())
    x = CASES[kind].inputs(dtype)
    y = trained(x)
    assert torch.equal(other(x), y)
    restored = adapter_state(other, ())
    assert restored.keys() == state.keys()
    assert all(torch.equal(restored[name], tensor) for name, tensor in state.items())
    first, second = trained.layer.merged(), trained.layer.merged()
    assert torch.equal(first.weight, second.weight)
    assert torch.equal(trained(x), y)
    assert not list(first.named_children())
    merge_lora(trained)
    eps = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    # An update much larger than the base loses as much as it is larger.
    parts = other.layer.base_layer(x).abs().max() + y.abs().max() + r * alpha
    assert (trained(x) - y).abs().max() <= 16 * eps * parts
    with pytest.raises(ValueError, match="has none"):
        merge_lora(trained)


@pytest.mark.parametrize(("kind", "variant"), PAIRS)
def test_names_modes_and_copies(kind: str, variant: str) -> None:
    layer = support.adapt(CASES[kind], variant)
    assert isinstance(layer, AdapterLayer)
    own = layer.own_tensors()
    assert set(own) == {n for n in layer.state_dict() if not n.startswith("base_layer.")}
    for name, parameter in layer.named_parameters():
        assert name.startswith("base_layer.") or own[name] is parameter
    assert all(parameter.requires_grad for parameter in layer.trained_parameters())
    x = CASES[kind].inputs()
    assert torch.equal(layer.train()(x), layer.eval()(x))
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        for tensor in twin.own_tensors().values():
            tensor.zero_().add_(2)
    assert not torch.equal(twin(x), layer(x))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("kind", "variant"), PAIRS)
def test_mode_is_that_of_the_base(kind: str, variant: str, training: bool) -> None:
    base = CASES[kind].make().train(training)
    layer = build_layer(base, "a", support.settings_of(variant, dropout=0.5))
    assert {module.training for module in layer.modules()} == {training}
    assert layer.merged().training == training


ATTRIBUTES = {
    "linear": ("weight", "bias", "in_features", "out_features"),
    "conv1d-transformers": ("weight", "bias", "nf", "nx"),
    "embedding": ("weight", "num_embeddings", "embedding_dim", "padding_idx"),
    "embedding-gemma": ("weight", "embed_scale", "scalar_embed_scale"),
    "conv2d": ("weight", "bias", "kernel_size", "stride", "padding", "dilation", "in_channels"),
}


@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize("kind", ATTRIBUTES)
def test_attributes_are_those_of_the_base(kind: str, variant: str) -> None:
    layer = support.adapt(CASES[kind], variant)
    assert isinstance(layer, TransparentLayer)
    for name in ATTRIBUTES[kind]:
        assert getattr(layer, name) is getattr(layer.base_layer, name)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = layer.no_such_name


def test_a_layer_that_is_not_built_yet_has_no_attributes() -> None:
    class Empty(LoraLinear):
        def __init__(self) -> None:
            nn.Module.__init__(self)

    with pytest.raises(AttributeError, match="'Empty' object has no attribute 'rank'"):
        _ = Empty().rank
    with pytest.raises(AttributeError, match="'Empty' object has no attribute 'rank'"):
        _ = Empty.__new__(Empty).rank


def test_buffers_that_are_kept_count_and_others_do_not() -> None:
    class Layer(LoraLinear):
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.base_layer = nn.BatchNorm1d(2)
            self.lengths = nn.Parameter(torch.ones(2))
            self.register_buffer("start", torch.zeros(2))
            self.register_buffer("cache", torch.zeros(2), persistent=False)

    layer = Layer()
    assert list(layer.own_tensors()) == ["lengths", "start"]
    assert layer.own_tensors()["lengths"] is layer.lengths
    assert [id(p) for p in layer.trained_parameters()] == [id(layer.lengths)]

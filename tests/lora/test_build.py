"""Every kind of layer with every variant: against numpy, against PEFT, and what it keeps."""

import importlib.util
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from peft import get_peft_model_state_dict
from torch import nn
from torch.nn.utils import parametrizations
from transformers.models.bart.modeling_bart import BartLearnedPositionalEmbedding

from lora_cli.errors import UserError
from lora_cli.lora.build import LAYERS, adaptable_kinds, build_layer
from lora_cli.lora.settings import LoraSettings, scale_of


def _sibling(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        f"build_{name}", Path(__file__).with_name(f"{name}.py")
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


algebra, support = _sibling("algebra"), _sibling("layer_support")
CASES, PAIRS = support.CASES, support.pairs()
# PEFT tells of layers that it treats rightly, and says where it will not merge.
pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning"),
    pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups:UserWarning"),
]


@pytest.mark.parametrize(("kind", "variant"), PAIRS)
def test_output_gradients_and_merge_are_the_algebra(kind: str, variant: str) -> None:
    layer = support.adapt(CASES[kind], variant, r=3, alpha=5.0)
    scale = 5 / math.sqrt(3) if variant.endswith("rslora") else 5 / 3
    algebra.compare(layer, CASES[kind].inputs(), scale=scale, tolerance=1e-5)


@pytest.mark.parametrize(("kind", "variant"), [p for p in PAIRS if p[1] != "lora_fa"])
def test_output_gradients_state_and_merge_are_those_of_peft(kind: str, variant: str) -> None:
    ours = support.adapt(CASES[kind], variant)
    model = support.peft_twin(ours, variant)
    theirs, x = model.base_model.model.layer, CASES[kind].inputs()
    found, wanted = ours(x), theirs(x)
    assert (found - wanted).abs().max() <= 1e-5
    upstream = torch.randn(found.shape, generator=torch.Generator().manual_seed(2))
    found.backward(upstream)
    wanted.backward(upstream)
    gradients = support.peft_tensors(model)
    for name, tensor in ours.own_tensors().items():
        torch.testing.assert_close(tensor.grad, gradients[name].grad, rtol=1e-5, atol=1e-5)
    saved = get_peft_model_state_dict(model, save_embedding_layers=False)
    prefix = "base_model.model.layer."
    assert {prefix + name for name in ours.own_tensors()} == saved.keys()
    for name, tensor in ours.own_tensors().items():
        assert torch.equal(tensor, saved[prefix + name])
        assert tensor.dtype == saved[prefix + name].dtype
    merged = model.merge_and_unload().layer.state_dict()
    assert ours.merged().state_dict().keys() == merged.keys()
    for name, tensor in ours.merged().state_dict().items():
        torch.testing.assert_close(tensor, merged[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("kind", "variant"), [p for p in PAIRS if p[1] in ("lora", "rslora")])
def test_dropout_is_that_of_peft(kind: str, variant: str) -> None:
    ours = support.adapt(CASES[kind], variant, dropout=0.4).train()
    theirs = support.peft_twin(ours, variant, lora_dropout=0.4).train()
    x = CASES[kind].inputs()
    torch.manual_seed(5)
    found = ours(x)
    torch.manual_seed(5)
    assert torch.allclose(found, theirs(x), atol=1e-5)
    looks_up = kind.startswith("embedding")
    assert torch.allclose(found, ours.eval()(x), atol=1e-5) == looks_up


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "variant"), PAIRS)
def test_no_more_is_kept_than_by_peft(
    kind: str, variant: str, dtype: torch.dtype, dropout: float
) -> None:
    case = CASES[kind]
    conv = kind.startswith("conv") and "transformers" not in kind
    if conv and "dora" in variant and dropout and dtype != torch.float32:
        pytest.skip("PEFT multiplies float32 inputs with bfloat16 weights there and fails")
    ours = support.adapt(case, variant, dtype=dtype, dropout=dropout).train()
    model = support.peft_twin(ours, variant, lora_dropout=dropout).train()
    theirs = model.base_model.model.layer
    for needs_gradient in (False, True) if case.shape else (False,):
        x = case.inputs(dtype).requires_grad_(needs_gradient)
        own = support.kept_bytes(lambda x=x: ours(x), ours, x)
        peft = support.kept_bytes(lambda x=x: theirs(x), model, x)
        assert 0 < own <= peft
        if "dora" in variant:
            assert own < peft


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("kind", "variant"), PAIRS)
def test_new_layer_is_its_base_and_keeps_its_weight(
    kind: str, variant: str, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    base = CASES[kind].make().to(dtype)
    weights = dict(base.named_parameters())
    before = {name: weight.clone() for name, weight in weights.items()}
    layer = build_layer(base, "a.b", support.settings_of(variant))
    x = CASES[kind].inputs(dtype)
    assert layer.base_layer is base
    assert torch.equal(layer(x), base(x))
    assert layer(x).dtype == dtype
    for name, weight in base.named_parameters():
        assert weight is weights[name]
        assert torch.equal(weight, before[name])
        assert not weight.requires_grad
    for tensor in layer.own_tensors().values():
        assert tensor.dtype == torch.float32
    owned = {id(t) for t in (*layer.own_tensors().values(), *base.parameters(), *base.buffers())}
    assert {id(t) for t in (*layer.parameters(), *layer.buffers())} == owned


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("kind", "variant"), PAIRS)
def test_merged_weight_is_rounded_once(kind: str, variant: str, dtype: torch.dtype) -> None:
    layer = support.adapt(CASES[kind], variant, dtype=dtype)
    exact = support.adapt(CASES[kind], variant, dtype=dtype).double().merged()
    merged = layer.merged()
    assert merged.weight.dtype == dtype
    assert torch.equal(merged.weight, exact.weight.to(dtype))
    # What was merged is the adapter as it computes, but for the rounding of outputs.
    x = CASES[kind].inputs(dtype)
    error = (layer(x).double() - merged(x).double()).abs().max()
    assert error <= 4 * torch.finfo(dtype).eps * (1 + layer(x).abs().max())


@pytest.mark.parametrize(("kind", "variant"), PAIRS)
def test_delta_is_what_merging_adds_even_under_autocast(kind: str, variant: str) -> None:
    layer = support.adapt(CASES[kind], variant)
    plain = layer.merged()
    with torch.autocast("cpu", torch.bfloat16):
        merged, delta = layer.merged(), layer.delta_weight()
    assert torch.equal(merged.weight, plain.weight)
    assert delta.dtype == torch.float32
    assert delta.shape == layer.base_layer.weight.shape
    assert not delta.requires_grad
    torch.testing.assert_close(layer.base_layer.weight + delta, merged.weight)


@pytest.mark.parametrize(("kind", "variant"), PAIRS)
def test_meta_device(kind: str, variant: str) -> None:
    with torch.device("meta"):
        layer = build_layer(CASES[kind].make(), "a.b", support.settings_of(variant))
    real = support.adapt(CASES[kind], variant).own_tensors()
    assert {n: t.shape for n, t in layer.own_tensors().items()} == {
        n: t.shape for n, t in real.items()
    }
    assert all(tensor.is_meta for tensor in layer.own_tensors().values())


def test_patterns_decide_rank_and_strength() -> None:
    settings = LoraSettings(r=2, alpha=4.0, rank_pattern={"b": 3}, alpha_pattern={"a.*": 9.0})
    layers: dict[str, Any] = {
        name: build_layer(nn.Linear(4, 4), name, settings) for name in ("a.b", "a.c", "c.b")
    }
    sizes = {name: layer.lora_A.weight.shape[0] for name, layer in layers.items()}
    assert sizes == {"a.b": 3, "a.c": 2, "c.b": 3}
    scales = {name: layer.scale for name, layer in layers.items()}
    assert scales == {"a.b": 3.0, "a.c": 4.5, "c.b": pytest.approx(4 / 3)}


REFUSED: dict[str, tuple[nn.Module, str, dict[str, Any], str]] = {
    "no such layer": (nn.LayerNorm(4), "lora", {}, "is LayerNorm"),
    "not of this variant": (nn.Embedding(4, 4), "lora_fa", {}, "is Embedding"),
    "groups": (nn.Conv1d(8, 8, 3, groups=4), "lora", {}, "multiple of the 4 groups"),
    "groups with lengths": (nn.Conv1d(8, 8, 3, groups=2), "dora", {}, "1 group"),
    "computed weight": (
        parametrizations.weight_norm(nn.Conv1d(8, 8, 3)),
        "lora",
        {},
        "computed from parametrizations.weight.original0",
    ),
    "other way": (BartLearnedPositionalEmbedding(8, 4), "lora", {}, "a way of its own"),
    "shortened": (nn.Embedding(8, 4, max_norm=1.0), "lora", {}, "max_norm"),
    "bias of an embedding": (nn.Embedding(8, 4), "lora", {"lora_bias": True}, "without bias"),
    "bias with lengths": (nn.Linear(8, 4), "dora", {"lora_bias": True}, "a bias"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_layers_that_cannot_be_adapted_are_refused_with_the_reason(name: str) -> None:
    base, variant, more, reason = REFUSED[name]
    trained = [parameter.requires_grad for parameter in base.parameters()]
    with pytest.raises(UserError) as caught:
        build_layer(base, "encoder.0.part", LoraSettings(r=2, alpha=2.0, variant=variant, **more))
    (problem,) = caught.value.problems
    assert problem.id == "lora.unsupported-layer"
    assert problem.key == "lora.targets"
    assert '"encoder.0.part"' in problem.message
    assert reason in problem.message
    assert problem.message.endswith(".")
    assert not problem.message.endswith("..")
    assert problem.fix is not None
    assert "lora.exclude=[part]" in problem.fix
    assert ("lora.variant=lora" in problem.fix) == (name == "not of this variant")
    assert [parameter.requires_grad for parameter in base.parameters()] == trained


def test_tables() -> None:
    assert "conv" in adaptable_kinds("lora_fa")
    assert "embedding" not in adaptable_kinds("lora_fa")
    assert list(LAYERS) == sorted(LAYERS)
    assert set(adaptable_kinds("lora")) >= set(adaptable_kinds("dora"))
    np.testing.assert_allclose(scale_of(9, 6.0, rslora=True), 2.0)

"""LoraConv: any geometry, groups, classes that are refused, real models."""

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations
from transformers import AutoConfig, AutoModel
from transformers.models.gemma4.modeling_gemma4 import Gemma4AudioCausalConv1d

from lora_cli.errors import UserError
from lora_cli.lora.conv import LoraConv
from lora_cli.lora.dora import DoraConv
from lora_cli.lora.inject import inject_lora
from lora_cli.lora.merge import merge_lora
from lora_cli.lora.settings import LoraSettings


def _sibling(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        f"conv_{name}", Path(__file__).with_name(f"{name}.py")
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


algebra, support = _sibling("algebra"), _sibling("layer_support")
CLASSES: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


@settings(max_examples=60, deadline=None)
@given(data=st.data(), dims=st.sampled_from([1, 1, 2, 2, 3]), dora=st.booleans())
def test_any_geometry_is_the_formula(data: st.DataObject, dims: int, dora: bool) -> None:
    def several(low: int, high: int) -> tuple[int, ...]:
        return tuple(data.draw(st.lists(st.integers(low, high), min_size=dims, max_size=dims)))

    groups = 1 if dora else data.draw(st.integers(1, 3))
    kernel, stride, dilation = several(1, 3), several(1, 2), several(1, 2)
    mode = data.draw(st.sampled_from(["zeros", "circular", "reflect", "replicate"]))
    padding: Any = several(0, 2)
    if set(stride) == {1} and all(k % 2 for k in kernel) and mode == "zeros":
        padding = data.draw(st.sampled_from([padding, "same", "valid"]))
    sizes = several(3, 5)
    spans = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    assume(all(size >= span for size, span in zip(sizes, spans, strict=True)))
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    base = CLASSES[dims](
        groups * data.draw(st.integers(1, 3)),
        groups * data.draw(st.integers(1, 3)),
        kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        padding_mode=mode,
        bias=data.draw(st.booleans()),
    )
    r = groups * data.draw(st.integers(1, 3))
    layer = (DoraConv if dora else LoraConv)(base, r=r, alpha=3.0)
    support.shake(layer)
    x = torch.randn(2, base.in_channels, *sizes)
    algebra.compare(layer, x, scale=3.0 / r)
    # A sample without a batch is a batch of one.
    torch.testing.assert_close(layer(x[0]), layer(x)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups:UserWarning")
def test_groups_are_those_of_peft_which_cannot_merge_them() -> None:
    layer = support.adapt(support.GROUPED, "lora", r=4)
    model = support.peft_twin(layer, "lora", r=4)
    theirs, x = model.base_model.model.layer, support.GROUPED.inputs()
    found, wanted = layer(x), theirs(x)
    assert (found - wanted).abs().max() <= 1e-5
    upstream = torch.randn(found.shape)
    found.backward(upstream)
    wanted.backward(upstream)
    gradients = support.peft_tensors(model)
    for name, tensor in layer.own_tensors().items():
        torch.testing.assert_close(tensor.grad, gradients[name].grad, rtol=1e-5, atol=1e-5)
    merged: Any = layer.merged()
    assert (merged.groups, merged.weight.shape) == (1, (6, 4, 3, 3))
    assert layer.delta_weight().shape == merged.weight.shape
    assert layer.base_layer.groups == 2
    torch.testing.assert_close(merged(x), found, rtol=0, atol=1e-5)


def test_a_rank_that_the_groups_cannot_share_is_refused() -> None:
    with pytest.raises(ValueError, match=r"multiple of the 2 groups of the convolution.* is 3"):
        LoraConv(nn.Conv2d(4, 6, 3, groups=2), r=3, alpha=1.0)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bias_of_the_update(bias: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    base: Any = nn.Conv2d(2, 3, 2, bias=bias).to(dtype)
    layer: Any = LoraConv(base, r=2, alpha=3.0, lora_bias=True)
    x = torch.randn(1, 2, 4, 4).to(dtype)
    assert torch.equal(layer(x), base(x))
    support.shake(layer)
    merged: Any = layer.merged()
    extra = 1.5 * layer.lora_B.bias.double()
    exact = extra + (base.bias.double() if bias else 0)
    assert torch.equal(merged.bias, exact.to(dtype))
    assert (base.bias is not None) == bias
    if dtype == torch.float32:
        torch.testing.assert_close(merged(x), layer(x), rtol=0, atol=1e-5)


def test_merging_copies_no_frozen_weight_and_changes_nothing() -> None:
    layer = support.adapt(support.CASES["conv2d"], "lora")
    before = layer.base_layer.weight.clone()
    first, second = layer.merged(), layer.merged()
    assert torch.equal(first.weight, second.weight)
    assert torch.equal(layer.base_layer.weight, before)
    assert type(first) is nn.Conv2d
    assert not any(p.requires_grad for p in first.parameters())
    owned = {parameter.data_ptr() for parameter in layer.parameters()}
    assert not owned & {parameter.data_ptr() for parameter in first.parameters()}


def _named_conv() -> nn.Module:
    class Depthwise(nn.Conv1d):
        """A class of its own that computes what its parent does."""

    return Depthwise(2, 2, 3)


def test_a_subclass_without_a_way_of_its_own_is_a_convolution() -> None:
    base: Any = _named_conv()
    layer = LoraConv(base, r=2, alpha=1.0)
    assert type(layer.merged()) is type(base)


def _old_weight_norm() -> nn.Module:
    with pytest.warns(FutureWarning, match="weight_norm"):
        return nn.utils.weight_norm(nn.Conv1d(4, 4, 3))


REFUSED = {
    "weight norm": (lambda: parametrizations.weight_norm(nn.Conv1d(4, 4, 3)), "computed from"),
    "old weight norm": (_old_weight_norm, "computed from weight_g, weight_v"),
    "spectral norm": (lambda: parametrizations.spectral_norm(nn.Conv1d(4, 4, 3)), "computed from"),
    "causal": (
        lambda: Gemma4AudioCausalConv1d(4, 4, kernel_size=3),
        "Gemma4AudioCausalConv1d has a way of its own",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_a_convolution_with_its_own_weight_is_refused(name: str) -> None:
    make, reason = REFUSED[name]
    base = make()
    with pytest.raises(ValueError, match=reason):
        LoraConv(base, r=2, alpha=1.0)
    assert all(parameter.requires_grad for parameter in base.parameters())


@pytest.mark.parametrize(("r", "dropout"), [(0, 0.0), (-1, 0.0), (1, 1.0), (1, -0.1)])
def test_values_out_of_range(r: int, dropout: float) -> None:
    with pytest.raises(ValueError, match=r"r must be|dropout must be"):
        LoraConv(nn.Conv1d(2, 2, 1), r=r, alpha=1.0, dropout=dropout)


IMAGE = {"hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1, "image_size": 8}
MODELS: dict[str, tuple[str, dict[str, Any], str, tuple[int, ...]]] = {
    "vit": ("projection", IMAGE | {"patch_size": 4}, "pixel_values", (1, 3, 8, 8)),
    "dinov2": ("projection", IMAGE | {"patch_size": 4}, "pixel_values", (1, 3, 8, 8)),
    "clip_vision_model": (
        "patch_embedding",
        IMAGE | {"patch_size": 4},
        "pixel_values",
        (1, 3, 8, 8),
    ),
    "wav2vec2": (
        "conv",
        {"hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1, "conv_dim": [8, 8]}
        | {"conv_kernel": [4, 3], "conv_stride": [2, 2], "num_feat_extract_layers": 2}
        | {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2},
        "input_values",
        (1, 60),
    ),
    # Reads the strides of its convolutions, which PEFT's layer does not have.
    "whisper": (
        "conv1",
        {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "num_mel_bins": 4}
        | {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": 20}
        | {"max_source_positions": 6, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        | {"decoder_start_token_id": 3},
        "input_features",
        (1, 4, 12),
    ),
}


def build(name: str) -> tuple[Any, list[str], dict[str, torch.Tensor]]:
    target, sizes, key, shape = MODELS[name]
    torch.manual_seed(0)
    heads = {} if name == "whisper" else {"num_attention_heads": 2}
    model = AutoModel.from_config(AutoConfig.for_model(name, **sizes, **heads)).eval()
    inputs = {key: torch.randn(shape)}
    if name == "whisper":
        inputs["decoder_input_ids"] = torch.tensor([[3, 4]])
    found = [n for n, _ in model.named_modules() if n.rpartition(".")[2] == target]
    return model, [n for n in found if "pos_conv" not in n], inputs


@pytest.mark.parametrize("variant", ["lora", "dora", "lora_fa"])
@pytest.mark.parametrize("name", MODELS)
def test_models_with_convolutions(name: str, variant: str) -> None:
    model, names, inputs = build(name)
    assert names
    before = model(**inputs).last_hidden_state
    inject_lora(model, names, LoraSettings(r=2, alpha=4.0, variant=variant))
    assert torch.equal(model(**inputs).last_hidden_state, before)
    for n in names:
        support.shake(model.get_submodule(n))
    adapted = model(**inputs).last_hidden_state
    assert not torch.allclose(adapted, before, atol=1e-3)
    merge_lora(model)
    torch.testing.assert_close(model(**inputs).last_hidden_state, adapted, rtol=0, atol=1e-5)


def test_the_positional_convolution_of_wav2vec2_is_refused() -> None:
    model, _, inputs = build("wav2vec2")
    before = model(**inputs).last_hidden_state
    name = "encoder.pos_conv_embed.conv"
    with pytest.raises(UserError, match=r'"encoder.pos_conv_embed.conv" cannot be: .* computed'):
        inject_lora(model, [name], LoraSettings(r=2, alpha=4.0))
    assert torch.equal(model(**inputs).last_hidden_state, before)

"""LoraAttention against plain attention in numpy, and against PEFT."""

import copy
from typing import Any

import numpy as np
import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn

from lora_cli.lora.attention import LoraAttention
from lora_cli.lora.build import build_layer
from lora_cli.lora.inject import freeze_base, inject_lora
from lora_cli.lora.merge import merge_lora
from lora_cli.lora.settings import LoraSettings
from lora_cli.lora.state import adapter_state, load_adapter_state

Array = np.ndarray[Any, np.dtype[np.float64]]

# With it torch calls a fused kernel; it warns that nested tensors are young.
pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")


class Encoder(nn.Module):
    """Torch's own encoder, which hands the weights of its attention to a kernel in evaluation."""

    def __init__(self, size: int = 16) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(size, 4, 2 * size, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)

    def forward(self, x: torch.Tensor, padding: torch.Tensor | None = None) -> torch.Tensor:
        found: torch.Tensor = self.encoder(x, src_key_padding_mask=padding)
        return found


NAMES = [f"encoder.layers.{index}.self_attn" for index in range(2)]


def adapted(model: nn.Module, *, r: int = 3, alpha: float = 6.0, rslora: bool = False) -> nn.Module:
    """A model whose two attentions have filled adapters."""
    inject_lora(model, NAMES, LoraSettings(r=r, alpha=alpha, rslora=rslora))
    freeze_base(model, ())
    generator = torch.Generator().manual_seed(5)
    state = {
        name: torch.randn(value.shape, generator=generator) * 0.3
        for name, value in adapter_state(model, ()).items()
    }
    load_adapter_state(model, state, ())
    return model


def array(tensor: torch.Tensor) -> Array:
    return tensor.detach().double().numpy()


def softmax(scores: Array) -> Array:
    powers = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def plain_attention(
    weight: Array, bias: Array, out_weight: Array, out_bias: Array, inputs: list[Array], heads: int
) -> Array:
    """Multi-head attention of one sequence, from the formula."""
    size = weight.shape[1]
    parts = [
        inputs[i] @ weight[i * size : (i + 1) * size].T + bias[i * size : (i + 1) * size]
        for i in range(3)
    ]
    width, found = size // heads, []
    for head in range(heads):
        q, k, v = (part[:, head * width : (head + 1) * width] for part in parts)
        found.append(softmax(q @ k.T / np.sqrt(width)) @ v)
    return np.concatenate(found, axis=1) @ out_weight.T + out_bias


@settings(max_examples=40)
@given(
    heads=st.integers(1, 3),
    width=st.integers(1, 4),
    r=st.integers(1, 5),
    alpha=st.floats(0.1, 8),
    bias=st.booleans(),
    seed=st.integers(0, 2**31),
    training=st.booleans(),
)
def test_forward_and_merge_are_the_formula(
    heads: int, width: int, r: int, alpha: float, bias: bool, seed: int, training: bool
) -> None:
    torch.manual_seed(seed)
    size = heads * width
    base = nn.MultiheadAttention(size, heads, bias=bias, batch_first=True).double()
    if bias:
        nn.init.normal_(base.in_proj_bias)
        nn.init.normal_(base.out_proj.bias)
    start = base(*[torch.ones(1, 2, size, dtype=torch.float64)] * 3)[0]
    layer = LoraAttention(base, r=r, alpha=alpha).double().train(training)
    assert torch.equal(layer(*[torch.ones(1, 2, size, dtype=torch.float64)] * 3)[0], start)
    nn.init.normal_(layer.lora_B.weight)
    nn.init.normal_(layer.base_layer.out_proj.lora_B.weight)

    inner = layer.base_layer.out_proj
    a, b, a_out, b_out = map(
        array, (layer.lora_A.weight, layer.lora_B.weight, inner.lora_A.weight, inner.lora_B.weight)
    )
    full = array(base.in_proj_weight) + alpha / r * b @ a
    full_out = array(base.out_proj.weight) + alpha / r * b_out @ a_out
    biases = [array(base.in_proj_bias), array(base.out_proj.bias)] if bias else [0 * full[:, 0], 0]
    query, key = torch.randn(3, size).double(), torch.randn(4, size).double()
    expected = plain_attention(
        full, biases[0], full_out, biases[1], [array(query), array(key), array(key) * 2], heads
    )
    inputs = (query[None], key[None], 2 * key[None])
    with torch.set_grad_enabled(training):
        found, _ = layer(*inputs)
    np.testing.assert_allclose(array(found[0]), expected, rtol=1e-8, atol=1e-8)

    merged = layer.merged()
    assert type(merged) is nn.MultiheadAttention
    assert not any("lora" in name for name, _ in merged.named_parameters())
    np.testing.assert_allclose(array(merged(*inputs)[0][0]), expected, rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(array(merged.in_proj_weight), full, rtol=1e-8, atol=1e-8)
    # The layer and the base that it was made of are what they were.
    np.testing.assert_allclose(array(layer(*inputs)[0][0]), expected, rtol=1e-8, atol=1e-8)
    assert type(base.out_proj).__name__ == "NonDynamicallyQuantizableLinear"


def test_fused_kernels_in_evaluation_see_the_adapter() -> None:
    torch.manual_seed(0)
    model = adapted(Encoder())
    x = torch.randn(3, 5, 16)
    padding = torch.tensor([[False] * 5, [False] * 4 + [True], [False] * 2 + [True] * 3])
    slow = model.train()(x, padding)
    whole = model(x)
    model.eval()
    with torch.no_grad():
        fused = model(x)
        masked = model(x, padding)
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            unfused = model(x)
        finally:
            torch.backends.mha.set_fastpath_enabled(True)
    torch.testing.assert_close(fused, whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(unfused, whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(masked[~padding], slow[~padding], rtol=1e-4, atol=1e-5)
    merge_lora(model)
    with torch.no_grad():
        torch.testing.assert_close(model(x), fused, rtol=1e-4, atol=1e-5)
    assert [type(m) for m in model.modules()].count(nn.MultiheadAttention) == 2


def peft_twin(model: nn.Module, *, rslora: bool = False) -> Any:
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["self_attn"], use_rslora=rslora)
    return get_peft_model(model, config)


def load_into_peft(twin: Any, state: dict[str, torch.Tensor]) -> None:
    """Load a state in the units of PEFT 0.21, which adds the update of out_proj twice.

    Its `MultiheadAttention.merge` sums the update into the output projection, and then has that
    merge itself (huggingface/peft#3774), so that half of it has to be in the file.
    """
    halved = {
        f"base_model.model.{name}": value / 2 if "out_proj.lora_B" in name else value
        for name, value in state.items()
    }
    result = peft.set_peft_model_state_dict(twin, halved)
    assert not result.unexpected_keys


@pytest.mark.parametrize("rslora", [False, True])
def test_equal_to_peft(rslora: bool) -> None:
    torch.manual_seed(0)
    model = Encoder()
    twin = peft_twin(copy.deepcopy(model), rslora=rslora)
    adapted(model, rslora=rslora)
    state = adapter_state(model, ())
    theirs = peft.get_peft_model_state_dict(twin)
    assert {
        name.removeprefix("base_model.model."): (v.shape, v.dtype) for name, v in theirs.items()
    } == {name: (value.shape, value.dtype) for name, value in state.items()}
    load_into_peft(twin, state)
    x = torch.randn(3, 5, 16)
    found, expected = model.train()(x), twin.train()(x)
    assert (found - expected).abs().max() <= 1e-5

    upstream = torch.randn_like(found)
    found.backward(upstream)
    expected.backward(upstream)
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert len(grads) == 8
    for name, parameter in twin.named_parameters():
        if not parameter.requires_grad:
            continue
        name = name.removeprefix("base_model.model.").replace(".default", "")
        # Only one of the two sums carries a gradient in PEFT: that of A' is half of what it should
        # be, and that of B' is right by chance, as B' is half.
        factor = 2 if "out_proj.lora_A" in name else 1
        ours, theirs_grad = grads[name], parameter.grad
        assert ours is not None
        assert theirs_grad is not None
        assert (ours - factor * theirs_grad).abs().max() <= 1e-5 * (1 + ours.abs().max())

    merge_lora(model)
    merged = twin.merge_and_unload().state_dict()
    assert merged.keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert (value - merged[name]).abs().max() <= 1e-6


def saved_bytes(model: Any, x: torch.Tensor) -> int:
    """Bytes of memory that one forward pass keeps for backward."""
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def test_saves_no_more_than_peft() -> None:
    torch.manual_seed(0)
    model = Encoder(64)
    twin = peft_twin(copy.deepcopy(model)).train()
    adapted(model).train()
    x = torch.randn(2, 5, 64)
    ours = saved_bytes(model, x)
    assert 0 < ours <= saved_bytes(twin, x)


def test_what_is_kept_of_the_attention() -> None:
    torch.manual_seed(0)
    base = nn.MultiheadAttention(
        8, 2, dropout=0.25, add_bias_kv=True, add_zero_attn=True, batch_first=True
    )
    layer = LoraAttention(base, r=2, alpha=2.0)
    nn.init.normal_(layer.lora_B.weight)
    trained = {name for name, value in layer.named_parameters() if value.requires_grad}
    factors = ("lora_A.weight", "lora_B.weight")
    assert trained == {*factors, *(f"base_layer.out_proj.{name}" for name in factors)}
    assert (layer.embed_dim, layer.num_heads, layer.batch_first, layer.head_dim) == (8, 2, True, 4)
    merged = layer.merged()
    assert merged.dropout == 0.25
    assert merged.add_zero_attn
    assert torch.equal(merged.bias_k, base.bias_k)
    x = torch.randn(2, 3, 8)
    layer.eval()
    torch.testing.assert_close(merged.eval()(x, x, x)[0], layer(x, x, x)[0])
    assert merged.training is False


def test_other_sizes_of_keys_are_refused() -> None:
    base = nn.MultiheadAttention(8, 2, kdim=4, vdim=6)
    with pytest.raises(ValueError, match="keys and values have 8, 4 and 6 features"):
        LoraAttention(base, r=2, alpha=2.0)


def test_bfloat16_is_rounded_once_when_merged() -> None:
    torch.manual_seed(0)
    layer = LoraAttention(nn.MultiheadAttention(8, 2).bfloat16(), r=2, alpha=2.0)
    nn.init.normal_(layer.lora_B.weight, std=0.1)
    assert layer.lora_A.weight.dtype == torch.float32
    exact = array(layer.base_layer.in_proj_weight) + array(layer.lora_B.weight) @ array(
        layer.lora_A.weight
    )
    merged = layer.merged()
    assert merged.in_proj_weight.dtype == torch.bfloat16
    assert (merged.in_proj_weight != torch.from_numpy(exact).bfloat16()).float().mean() < 0.01
    x = torch.randn(3, 1, 8, dtype=torch.bfloat16)
    torch.testing.assert_close(layer(x, x, x)[0], merged(x, x, x)[0], rtol=0.05, atol=0.05)


def test_built_by_kind() -> None:
    layer = build_layer(nn.MultiheadAttention(8, 2), "attn", LoraSettings(r=2, alpha=3.0))
    assert isinstance(layer, LoraAttention)
    assert layer.scale == 1.5

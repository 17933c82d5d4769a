"""VeRA against plain algebra; tests/contract/test_peft_vera.py compares it with PEFT."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import BertConfig, BertForSequenceClassification
from transformers.pytorch_utils import Conv1D

from lora_cli.lora.inject import freeze_base, inject_lora
from lora_cli.lora.merge import merge_lora
from lora_cli.lora.settings import LoraSettings
from lora_cli.lora.state import adapter_state
from lora_cli.lora.targets import match_targets
from lora_cli.lora.vera import SHARED_NAME, SharedFactors, VeraLinear, share_factors

SETTINGS = LoraSettings(r=5, alpha=1.0, variant="vera", d_initial=0.3, projection_seed=11)


def build_base() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    config = BertConfig(vocab_size=40, num_attention_heads=2, num_labels=3, **sizes)
    return BertForSequenceClassification(config).eval()


def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    return {
        "input_ids": torch.randint(1, 40, (6, 7), generator=generator),
        "labels": torch.randint(0, 3, (6,), generator=generator),
    }


def build_ours() -> nn.Module:
    base = build_base()
    targets = ("query", "dense")
    names = match_targets(base, targets=targets, saved_modules=("classifier",))
    inject_lora(base, names, SETTINGS)
    freeze_base(base, ("classifier",))
    return base


def shake(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)


def gap(one: nn.Module, other: nn.Module) -> float:
    with torch.no_grad():
        return (one(**batch()).logits - other(**batch()).logits).abs().max().item()


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_layer_against_numpy(kind: str) -> None:
    torch.manual_seed(3)
    base = nn.Linear(5, 4) if kind == "linear" else Conv1D(4, 5)
    model = nn.ModuleList([base, nn.Linear(7, 2)])
    inject_lora(model, ["0", "1"], SETTINGS)
    layer, shared = model[0], model.get_submodule(SHARED_NAME)
    assert isinstance(layer, VeraLinear)
    assert shared.A.shape == (5, 7)
    assert shared.B.shape == (4, 5)
    nn.init.normal_(layer.vera_lambda_b)
    nn.init.normal_(layer.vera_lambda_d)
    A, B, d, b, weight, bias = (
        t.detach().double().numpy()
        for t in (
            shared.A,
            shared.B,
            layer.vera_lambda_d,
            layer.vera_lambda_b,
            base.weight,
            base.bias,
        )
    )
    weight = weight.T if kind == "conv1d" else weight
    x = torch.randn(2, 6, 5)
    update = np.diag(b) @ B @ np.diag(d) @ A[:, :5]
    expected = x.double().numpy() @ (weight + update).T + bias
    np.testing.assert_allclose(layer(x).detach().numpy(), expected, atol=1e-5)
    merged = layer.merged()
    np.testing.assert_allclose(merged(x).detach().numpy(), expected, atol=1e-5)
    assert type(merged) is type(base)
    assert layer.delta_weight().shape == base.weight.shape
    assert torch.equal(layer.merged().weight, merged.weight)


@given(
    r=st.integers(1, 9),
    sizes=st.lists(st.tuples(st.integers(1, 8), st.integers(1, 8)), min_size=1, max_size=4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_layers_of_any_shapes_share(
    r: int, sizes: list[tuple[int, int]], dtype: torch.dtype, seed: int
) -> None:
    torch.manual_seed(seed)
    model = nn.ModuleList(nn.Linear(*size, dtype=dtype) for size in sizes)
    names = [str(number) for number in range(len(sizes))]
    inject_lora(model, names, replace(SETTINGS, r=r))
    freeze_base(model, ())
    shared = model.get_submodule(SHARED_NAME)
    assert shared.A.shape == (r, max(size[0] for size in sizes))
    assert shared.B.shape == (max(size[1] for size in sizes), r)
    shake(model)
    state = adapter_state(model, ())
    assert sum(name.startswith(SHARED_NAME) for name in state) == 2
    inputs = [torch.randn(3, size[0], dtype=dtype) for size in sizes]
    before = [model[n](x) for n, x in enumerate(inputs)]
    merge_lora(model)
    tolerance = 1e-5 if dtype == torch.float32 else 5e-2
    for number, x in enumerate(inputs):
        after = model[number](x)
        assert after.dtype == before[number].dtype == dtype
        torch.testing.assert_close(after, before[number], rtol=tolerance, atol=tolerance)


def test_the_factors_move_with_the_model_and_are_copied_with_it() -> None:
    model = build_ours()
    shake(model)
    twin = copy.deepcopy(model)
    shared = twin.get_submodule(SHARED_NAME)
    users = [module for module in twin.modules() if isinstance(module, VeraLinear)]
    assert all(layer._shared[0] is shared for layer in users)
    assert gap(model, twin) == 0.0
    with torch.no_grad():
        shared.A.zero_()
    assert gap(model, twin) > 1e-3
    meta = twin.to("meta")
    assert {layer._factors()[0].device.type for layer in users} == {"meta"}
    assert not any(p.requires_grad for p in meta.get_submodule(SHARED_NAME).buffers())


def test_the_factors_do_not_touch_the_global_generator() -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    factors = SharedFactors(r=4, sizes=(300, 200), seed=0, device=torch.device("cpu"))
    assert torch.equal(torch.rand(3), expected)
    for tensor, fan_in in ((factors.A, 300), (factors.B, 4)):
        bound = (6 / fan_in) ** 0.5
        assert 0.95 * bound < tensor.abs().max() <= bound
        assert abs(tensor.mean()) < 0.1 * bound
    other = SharedFactors(r=4, sizes=(300, 200), seed=1, device=torch.device("cpu"))
    assert not torch.equal(factors.A, other.A)


def test_models_without_vera_get_no_factors() -> None:
    model = nn.ModuleList([nn.Linear(3, 3)])
    share_factors(model, [], SETTINGS)
    assert not hasattr(model, SHARED_NAME)


@pytest.mark.parametrize(("r", "dropout"), [(0, 0.0), (1, 1.0), (1, -0.1)])
def test_impossible_values(r: int, dropout: float) -> None:
    with pytest.raises(ValueError, match="must be"):
        VeraLinear(nn.Linear(2, 2), r=r, dropout=dropout)

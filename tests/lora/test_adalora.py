"""AdaLoRA against plain algebra; tests/contract/test_peft_adalora.py compares it with PEFT."""

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

from lora_cli.errors import UserError
from lora_cli.lora.adalora import AdaLoraLinear, RankAllocator
from lora_cli.lora.inject import freeze_base, inject_lora, trainable_parameters
from lora_cli.lora.settings import AdaLoraSettings, LoraSettings
from lora_cli.lora.state import adapter_state, load_adapter_state
from lora_cli.lora.targets import match_targets

PLAN = AdaLoraSettings(init_r=4, total_steps=30, warmup_steps=3, final_steps=8, every=2)
SETTINGS = LoraSettings(r=2, alpha=6.0, variant="adalora", adalora=PLAN)


def build_base() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    config = BertConfig(vocab_size=40, num_attention_heads=2, num_labels=3, **sizes)
    return BertForSequenceClassification(config).eval()


def batch(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {
        "input_ids": torch.randint(1, 40, (6, 7), generator=generator),
        "labels": torch.randint(0, 3, (6,), generator=generator),
    }


def build_ours() -> nn.Module:
    base = build_base()
    targets = ("query", "value", "output.dense")
    names = match_targets(base, targets=targets, saved_modules=("classifier",))
    torch.manual_seed(1)
    inject_lora(base, names, SETTINGS)
    freeze_base(base, ("classifier",))
    return base


def train_step(
    ours: nn.Module, allocator: RankAllocator, optimizer: torch.optim.Optimizer, step: int
) -> None:
    loss = ours(**batch(step)).loss
    penalty = allocator.penalty()
    (loss if penalty is None else loss + penalty).backward()
    optimizer.step()
    allocator.after_step(step)
    optimizer.zero_grad()


def masks_of(model: nn.Module) -> dict[str, list[bool]]:
    return {
        f"{name}.lora_E": (module.lora_E.flatten() != 0).tolist()
        for name, module in model.named_modules()
        if isinstance(module, AdaLoraLinear)
    }


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_layer_against_numpy(kind: str) -> None:
    torch.manual_seed(3)
    base = nn.Linear(5, 4) if kind == "linear" else Conv1D(4, 5)
    with torch.no_grad():
        base.bias.normal_()
    layer = AdaLoraLinear(base, r=3, alpha=6.0)
    nn.init.normal_(layer.lora_E)
    x = torch.randn(2, 6, 5)
    weight = base.weight.detach().double().numpy()
    weight = weight.T if kind == "conv1d" else weight
    A, B, E = (p.detach().double().numpy() for _, p in layer.triplets())
    update = B @ np.diag(E[:, 0]) @ A * 6.0 / (3 + 1e-5)
    expected = x.double().numpy() @ (weight + update).T + base.bias.detach().double().numpy()
    np.testing.assert_allclose(layer(x).detach().numpy(), expected, atol=1e-5)
    merged = layer.merged()
    np.testing.assert_allclose(merged(x).detach().numpy(), expected, atol=1e-5)
    assert type(merged) is type(base)
    delta = layer.delta_weight()
    assert delta.shape == base.weight.shape
    assert torch.equal(merged.weight, base.weight + delta)
    assert torch.equal(layer.merged().weight, merged.weight)


@given(
    r=st.integers(1, 9),
    inputs=st.integers(1, 8),
    outputs=st.integers(1, 8),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_new_layers_are_the_base_and_merging_is_rounded_once(
    r: int, inputs: int, outputs: int, dtype: torch.dtype, seed: int
) -> None:
    torch.manual_seed(seed)
    base = nn.Linear(inputs, outputs, dtype=dtype)
    layer = AdaLoraLinear(base, r=r, alpha=2.0)
    x = torch.randn(3, inputs, dtype=dtype)
    assert torch.equal(layer(x), base(x))
    assert layer(x).dtype == dtype
    assert {p.dtype for p in layer.trained_parameters()} == {torch.float32}
    nn.init.normal_(layer.lora_E)
    other = AdaLoraLinear(base, r=r, alpha=2.0)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))
    A, B, E = (p.detach().double() for _, p in layer.triplets())
    exact = base.weight.double() + B @ (E * A) * (2.0 / (r + 1e-5))
    rounded = exact.to(dtype)
    found = layer.merged().weight
    # The last bit of float32 may differ, that of bfloat16 only where float32 is on the border.
    torch.testing.assert_close(
        found, rounded, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-6
    )
    if dtype == torch.bfloat16:
        assert (found == rounded).float().mean() > 0.9


def test_the_budget_is_the_cubic_of_the_paper() -> None:
    layers = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    inject_lora(layers, ["0", "1"], SETTINGS)
    allocator = RankAllocator(layers, r=2, settings=PLAN)
    found = [allocator.budget(step) for step in range(1, 31)]
    # Equation 12: b(T) + (b(0) - b(T)) (1 - (t - t_i) / (T - t_i - t_f))^3, with 8 and 4 ranks.
    middle = [4 + 4 * (1 - (t - 3) / (30 - 3 - 8)) ** 3 for t in range(4, 22)]
    assert found[:3] == [8, 8, 8]
    assert found[3:21] == [int(value) for value in middle]
    assert found[21:] == [4] * 9
    assert found == sorted(found, reverse=True)


def test_a_layer_without_gradient_loses_its_ranks_first() -> None:
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
    plan = AdaLoraSettings(init_r=2, total_steps=4, every=1, orthogonal=0.0)
    inject_lora(model, ["0", "1"], replace(SETTINGS, r=1, adalora=plan))
    allocator = RankAllocator(model, r=1, settings=plan)
    assert allocator.penalty() is None
    used, unused = model
    for step in range(1, 5):
        used(torch.randn(4, 3)).square().sum().backward()
        with torch.no_grad():
            for parameter in used.trained_parameters():
                parameter -= 0.1 * parameter.grad
        allocator.after_step(step)
        model.zero_grad()
    assert masks_of(model) == {"0.lora_E": [True, True], "1.lora_E": [False, False]}
    assert not unused.lora_E.any()


@pytest.mark.parametrize("stop", [1, 5, 11, 25])
def test_state_continues_bit_equal(stop: int) -> None:
    whole = build_ours()
    allocator = RankAllocator(whole, r=2, settings=PLAN)
    optimizer = torch.optim.SGD(trainable_parameters(whole).values(), lr=0.5)
    state, tensors = {}, {}
    for step in range(1, 31):
        train_step(whole, allocator, optimizer, step)
        if step == stop:
            state, tensors = allocator.state(), adapter_state(whole, ("classifier",))
    frozen = copy.deepcopy(state)
    resumed = build_ours()
    load_adapter_state(resumed, tensors, ("classifier",))
    second = RankAllocator(resumed, r=2, settings=PLAN)
    second.load_state(state)
    optimizer = torch.optim.SGD(trainable_parameters(resumed).values(), lr=0.5)
    for step in range(stop + 1, 31):
        train_step(resumed, second, optimizer, step)
    expected = adapter_state(whole, ("classifier",))
    found = adapter_state(resumed, ("classifier",))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert all(torch.equal(state[name], frozen[name]) for name in frozen)


def test_a_foreign_state_is_refused() -> None:
    allocator = RankAllocator(build_ours(), r=2, settings=PLAN)
    with pytest.raises(UserError, match=r"other\.layer"):
        allocator.load_state({"mean/other.layer.lora_A": torch.zeros(1)})
    name = next(name for name in masks_of(build_ours()))
    with pytest.raises(UserError, match="lora_E"):
        allocator.load_state({f"mean/{name}": torch.zeros(7, 1)})


def test_a_skipped_last_step_of_the_reduction_is_made_up_for() -> None:
    model = build_ours()
    allocator = RankAllocator(model, r=2, settings=PLAN)
    optimizer = torch.optim.SGD(trainable_parameters(model).values(), lr=0.5)
    for step in range(1, 31):
        if step != PLAN.total_steps - PLAN.final_steps:
            train_step(model, allocator, optimizer, step)
    assert sum(map(sum, masks_of(model).values())) == 2 * len(masks_of(model))


@pytest.mark.parametrize(("r", "dropout"), [(0, 0.0), (1, 1.0), (1, -0.1)])
def test_impossible_values(r: int, dropout: float) -> None:
    with pytest.raises(ValueError, match="must be"):
        AdaLoraLinear(nn.Linear(2, 2), r=r, alpha=1.0, dropout=dropout)


def test_dropout_is_of_the_update_alone() -> None:
    torch.manual_seed(0)
    layer = AdaLoraLinear(nn.Linear(4, 4), r=2, alpha=2.0, dropout=0.5).train()
    x = torch.ones(3, 4)
    assert torch.equal(layer(x), layer.base_layer(x))
    nn.init.ones_(layer.lora_E)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))

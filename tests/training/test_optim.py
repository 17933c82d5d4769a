import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from torch import nn

from lora_cli.config.optim import AdafactorConfig, AdamWConfig, OptimizerConfig, SgdConfig
from lora_cli.errors import UserError
from lora_cli.training.optim import (
    build_optimizer,
    load_optimizer_state,
    optimizer_state,
    set_lr,
)

CONFIGS = [
    AdamWConfig(lr=0.02, weight_decay=0.1, betas=(0.8, 0.95), eps=1e-6),
    SgdConfig(lr=0.02, weight_decay=0.1, momentum=0.7),
    AdafactorConfig(lr=0.02, weight_decay=0.1),
]


def parameters() -> dict[str, nn.Parameter]:
    torch.manual_seed(0)
    return {
        "lora_A.weight": nn.Parameter(torch.randn(3, 4)),
        "classifier.bias": nn.Parameter(torch.randn(4)),
    }


def train(
    optimizer: torch.optim.Optimizer, named: dict[str, nn.Parameter], *, first: int, last: int
) -> None:
    for step in range(first, last):
        optimizer.zero_grad()
        x = torch.sin(torch.arange(6.0).reshape(2, 3) + step)
        loss = (x @ named["lora_A.weight"] + named["classifier.bias"]).square().sum()
        loss.backward()
        optimizer.step()


def theirs(config: OptimizerConfig, named: dict[str, nn.Parameter]) -> torch.optim.Optimizer:
    matrix, bias = named.values()
    groups = [{"params": [matrix], "weight_decay": 0.1}, {"params": [bias], "weight_decay": 0.0}]
    if isinstance(config, AdamWConfig):
        return torch.optim.AdamW(groups, lr=0.02, betas=(0.8, 0.95), eps=1e-6)
    if isinstance(config, SgdConfig):
        return torch.optim.SGD(groups, lr=0.02, momentum=0.7)
    return torch.optim.Adafactor(groups, lr=0.02)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
def test_ten_steps_equal_torch(config: OptimizerConfig) -> None:
    ours, reference = parameters(), parameters()
    train(build_optimizer(config, ours), ours, first=0, last=10)
    train(theirs(config, reference), reference, first=0, last=10)
    for name in ours:
        assert torch.equal(ours[name], reference[name])


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
def test_state_by_name_continues_bit_equal_whatever_the_order(config: OptimizerConfig) -> None:
    whole = parameters()
    train(build_optimizer(config, whole), whole, first=0, last=8)

    first = parameters()
    optimizer = build_optimizer(config, first)
    train(optimizer, first, first=0, last=5)
    state = optimizer_state(optimizer, first)
    assert all(name.rpartition("/")[0] in first for name in state)

    values = {name: parameter.detach().clone() for name, parameter in reversed(first.items())}
    second = {name: nn.Parameter(value) for name, value in values.items()}
    resumed = build_optimizer(config, second)
    load_optimizer_state(resumed, second, state)
    train(resumed, second, first=5, last=8)
    for name in whole:
        assert torch.equal(second[name], whole[name])


def test_a_saved_state_is_a_copy() -> None:
    named = parameters()
    optimizer = build_optimizer(AdamWConfig(), named)
    train(optimizer, named, first=0, last=1)
    state = optimizer_state(optimizer, named)
    before = {name: value.clone() for name, value in state.items()}
    train(optimizer, named, first=1, last=2)
    assert all(torch.equal(state[name], before[name]) for name in state)


def test_a_moment_of_no_parameter_is_refused() -> None:
    named = parameters()
    optimizer = build_optimizer(AdamWConfig(), named)
    with pytest.raises(UserError, match="old_layer"):
        load_optimizer_state(optimizer, named, {"old_layer.weight/exp_avg": torch.zeros(1)})


def test_learning_rate_reaches_every_group() -> None:
    optimizer = build_optimizer(AdamWConfig(), parameters())
    set_lr(optimizer, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.5]


def factors() -> dict[str, nn.Parameter]:
    """Adapters of several kinds and a head, named as ours."""
    shapes: dict[str, tuple[int, ...]] = {
        "a.query.lora_A.weight": (2, 4),
        "a.query.lora_B.weight": (4, 2),
        "a.query.lora_B.bias": (4,),
        "a.query.lora_magnitude_vector": (4,),
        "a.lora_B_like.weight": (3, 3),
        "a.key.lora_A": (2, 4),
        "a.key.lora_B": (4, 2),
        "a.key.lora_E": (2, 1),
        "a.words.lora_embedding_A": (2, 9),
        "a.words.lora_embedding_B": (4, 2),
        "classifier.weight": (2, 4),
        "classifier.bias": (2,),
    }
    return {name: nn.Parameter(torch.ones(shape)) for name, shape in shapes.items()}


def rates(optimizer: torch.optim.Optimizer, named: dict[str, nn.Parameter]) -> dict[str, float]:
    names = {id(parameter): name for name, parameter in named.items()}
    return {
        names[id(parameter)]: group["lr"]
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
def test_lora_plus_is_for_every_b_and_for_nothing_else(config: OptimizerConfig) -> None:
    named = factors()
    optimizer = build_optimizer(replace(config, lora_plus_ratio=16.0), named)
    b = {
        "a.query.lora_B.weight",
        "a.query.lora_B.bias",
        "a.key.lora_B",
        "a.words.lora_embedding_B",
    }
    assert rates(optimizer, named) == {n: 0.02 * (16 if n in b else 1) for n in named}
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert {n for n, p in named.items() if decay[id(p)] == 0.1} == {
        name for name, value in named.items() if value.ndim == 2
    }
    # The schedule keeps the ratio.
    set_lr(optimizer, 0.5)
    assert rates(optimizer, named) == {n: 0.5 * (16 if n in b else 1) for n in named}


def test_a_ratio_of_one_changes_nothing() -> None:
    plain = build_optimizer(AdamWConfig(), parameters())
    assert [group["lr"] for group in plain.param_groups] == [2e-3, 2e-3]
    assert [len(group["params"]) for group in plain.param_groups] == [1, 1]


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_lora_plus_equals_peft(decay: float) -> None:
    """On matrices alone: PEFT gives the higher rate to every vector too, the paper does not."""
    base = nn.Sequential(nn.Linear(4, 6, bias=False), nn.Tanh(), nn.Linear(6, 3, bias=False))
    config = LoraConfig(r=2, target_modules=["0"], modules_to_save=["2"])
    theirs = get_peft_model(base, config)
    ours = copy.deepcopy(theirs)
    reference = create_loraplus_optimizer(
        theirs, torch.optim.AdamW, lr=0.01, loraplus_lr_ratio=16.0, loraplus_weight_decay=decay
    )
    named = {n: p for n, p in ours.named_parameters() if p.requires_grad}
    assert len(named) == 3
    optimizer = build_optimizer(
        AdamWConfig(lr=0.01, weight_decay=decay, lora_plus_ratio=16.0), named
    )
    for model, used in ((theirs, reference), (ours, optimizer)):
        for step in range(10):
            used.zero_grad()
            model(torch.sin(torch.arange(8.0).reshape(2, 4) + step)).square().sum().backward()
            used.step()
    for name, parameter in theirs.named_parameters():
        assert torch.equal(dict(ours.named_parameters())[name], parameter)


def test_a_state_of_lora_plus_continues_bit_equal() -> None:
    def build() -> dict[str, nn.Parameter]:
        torch.manual_seed(0)
        return {
            "x.lora_B.weight": nn.Parameter(torch.randn(3, 4)),
            "classifier.bias": nn.Parameter(torch.randn(4)),
        }

    def run(optimizer: torch.optim.Optimizer, named: Any, first: int, last: int) -> None:
        for step in range(first, last):
            set_lr(optimizer, 0.1 / (step + 1))
            optimizer.zero_grad()
            x = torch.sin(torch.arange(6.0).reshape(2, 3) + step)
            (x @ named["x.lora_B.weight"] + named["classifier.bias"]).square().sum().backward()
            optimizer.step()

    config = AdamWConfig(lora_plus_ratio=8.0)
    whole, half = build(), build()
    run(build_optimizer(config, whole), whole, 0, 8)
    optimizer = build_optimizer(config, half)
    run(optimizer, half, 0, 5)
    state = optimizer_state(optimizer, half)
    values = {name: nn.Parameter(p.detach().clone()) for name, p in half.items()}
    resumed = build_optimizer(config, values)
    load_optimizer_state(resumed, values, state)
    run(resumed, values, 5, 8)
    assert all(torch.equal(values[name], whole[name]) for name in whole)

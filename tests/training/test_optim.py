import pytest
import torch
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

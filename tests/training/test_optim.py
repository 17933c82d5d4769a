import copy
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from torch import nn

from lora_cli.config.optim import (
    AdafactorConfig,
    AdamW8BitConfig,
    AdamWConfig,
    LionConfig,
    OptimizerConfig,
    ScheduleFreeConfig,
    SgdConfig,
)
from lora_cli.errors import UserError
from lora_cli.training.averages import build_averages
from lora_cli.training.optim import (
    build_optimizer,
    check_optimizer,
    load_optimizer_state,
    optimizer_state,
    set_lr,
)

CONFIGS = [
    AdamWConfig(lr=0.02, weight_decay=0.1, betas=(0.8, 0.95), eps=1e-6),
    SgdConfig(lr=0.02, weight_decay=0.1, momentum=0.7),
    AdafactorConfig(lr=0.02, weight_decay=0.1),
]

LATER = [
    LionConfig(lr=0.01, weight_decay=0.1, betas=(0.8, 0.95)),
    ScheduleFreeConfig(lr=0.02, weight_decay=0.1, betas=(0.8, 0.95), eps=1e-6),
    AdamW8BitConfig(lr=0.02, weight_decay=0.1, betas=(0.8, 0.95), eps=1e-6, min_size=1),
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


@pytest.mark.parametrize("config", [*CONFIGS, *LATER], ids=lambda config: config.name)
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
    optimizer = build_optimizer(AdamWConfig(weight_decay=0.1), parameters())
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
    plain = build_optimizer(AdamWConfig(weight_decay=0.1), parameters())
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


def gradients() -> list[np.ndarray[Any, Any]]:
    return [np.sin(np.arange(12.0).reshape(3, 4) * (step + 1)) for step in range(3)]


def three_steps(config: OptimizerConfig, lrs: list[float]) -> tuple[Any, Any, torch.nn.Parameter]:
    """Return the weights before and after three steps, and the parameter of `optimizer`."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(3, 4))
    before = weight.detach().numpy().astype(np.float64)
    optimizer = build_optimizer(config, {"lora_A.weight": weight})
    for lr, gradient in zip(lrs, gradients(), strict=True):
        set_lr(optimizer, lr)
        weight.grad = torch.from_numpy(gradient).float()
        optimizer.step()
    return before, optimizer, weight


def test_lion_equals_the_algebra_of_the_paper() -> None:
    lrs = [0.01, 0.02, 0.005]
    x, _, weight = three_steps(LATER[0], lrs)
    m = np.zeros_like(x)
    for lr, g in zip(lrs, gradients(), strict=True):
        c = 0.8 * m + 0.2 * g
        x = x - lr * (np.sign(c) + 0.1 * x)
        m = 0.95 * m + 0.05 * g
    np.testing.assert_allclose(weight.detach().numpy(), x, rtol=1e-5)


def test_schedule_free_equals_the_algebra_of_the_paper() -> None:
    """Algorithm 1 of arXiv:2405.15682: z moves, x is its average, gradients are taken at y."""
    lrs = [0.01, 0.02, 0.02]
    y, optimizer, weight = three_steps(LATER[1], lrs)
    z = x = y
    v, total = np.zeros_like(y), 0.0
    for t, (lr, g) in enumerate(zip(lrs, gradients(), strict=True), start=1):
        v = 0.95 * v + 0.05 * g**2
        step = g / (np.sqrt(v / (1 - 0.95**t)) + 1e-6) + 0.1 * y
        z = z - lr * step
        total += max(lrs[:t]) ** 2
        c = max(lrs[:t]) ** 2 / total
        x = (1 - c) * x + c * z
        y = 0.2 * z + 0.8 * x
    np.testing.assert_allclose(weight.detach().numpy(), y, rtol=1e-5)
    with build_averages(None, optimizer=optimizer, parameters={"w": weight}).applied():
        np.testing.assert_allclose(weight.detach().numpy(), x, rtol=1e-5)
    np.testing.assert_allclose(weight.detach().numpy(), y, rtol=1e-5)


def test_8_bit_adamw_stays_close_to_adamw_with_a_quarter_of_the_moments() -> None:
    torch.manual_seed(0)
    start = torch.randn(64, 64)
    found = {}
    for config in (AdamW8BitConfig(lr=1e-2, min_size=4096), AdamWConfig(lr=1e-2)):
        weight = nn.Parameter(start.clone())
        optimizer = build_optimizer(config, {"lora_A.weight": weight})
        for step in range(20):
            weight.grad = torch.sin(start * (step + 1))
            optimizer.step()
        moments = optimizer_state(optimizer, {"w": weight})
        size = sum(x.nbytes for name, x in moments.items() if x.shape == start.shape)
        found[config.name] = (weight.detach(), size)
    (ours, small), (theirs, large) = found["adamw_8bit"], found["adamw"]
    assert 4 * small == large == 2 * 4 * 64 * 64
    moved = (theirs - start).abs().mean()
    assert (ours - theirs).abs().mean() < 0.1 * moved


@pytest.mark.parametrize("name", ["lion", "schedule_free", "adamw_8bit"])
def test_a_missing_package_names_its_extra(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_optimizer(name)
    monkeypatch.setattr("lora_cli.training.optim.find_spec", lambda _: None)
    check_optimizer("adamw")
    with pytest.raises(UserError, match=f"{name} needs") as caught:
        check_optimizer(name)
    extra = "quantization" if name == "adamw_8bit" else "optimizers"
    assert caught.value.problems[0].fix == f'pip install "lora-cli[{extra}]"'
    pyproject = Path(__file__).parents[2] / "pyproject.toml"
    extras = tomllib.loads(pyproject.read_text())["project"]["optional-dependencies"]
    package = {"lion": "lion-pytorch", "schedule_free": "schedulefree"}.get(name, "bitsandbytes")
    assert any(entry.startswith(package) for entry in extras[extra])


def test_a_and_b_may_have_a_weight_decay_of_their_own() -> None:
    """With a gradient of zero, plain descent multiplies weights by 1 - lr * decay."""
    named = {
        f"x.{name}": nn.Parameter(torch.ones(2, 2))
        for name in ("lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B", "w")
    } | {"x.bias": nn.Parameter(torch.ones(2))}
    config = SgdConfig(weight_decay=0.1, weight_decay_a=0.2, weight_decay_b=0.0, momentum=0.0)
    optimizer = build_optimizer(config, named)
    set_lr(optimizer, 0.5)
    for parameter in named.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    left = {name: parameter.detach().unique().item() for name, parameter in named.items()}
    assert left == pytest.approx(
        {
            "x.lora_A.weight": 0.9,
            "x.lora_B.weight": 1.0,
            "x.lora_embedding_A": 0.9,
            "x.lora_embedding_B": 1.0,
            "x.w": 0.95,
            "x.bias": 1.0,
        }
    )

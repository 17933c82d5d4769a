"""The dead-adapter alarm: heads, modules of the body, and what other strategies train."""

import importlib.util
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification

from lora_cli.config.strategies import AdapterStrategyConfig, PrefixStrategyConfig
from lora_cli.errors import RunFailedError
from lora_cli.lora.layer import AdapterLayer
from lora_cli.lora.strategies import apply_strategy
from lora_cli.training.watch import LAST_STEP, AdapterWatch

_watched_spec = importlib.util.spec_from_file_location(
    "watched_of_watch", Path(__file__).with_name("watched.py")
)
assert _watched_spec is not None
assert _watched_spec.loader is not None
watched = importlib.util.module_from_spec(_watched_spec)
_watched_spec.loader.exec_module(watched)
Net, train, fault = watched.Net, watched.train, watched.fault

ModelDir = Callable[..., Path]


def never_pooled(net: Net, x: torch.Tensor) -> torch.Tensor:
    y: torch.Tensor = net.two(net.one(x))
    return y


def pooled(net: Net, x: torch.Tensor) -> torch.Tensor:
    """Like a model that always computes its pooler, and a task that takes the mean instead."""
    net.pooler(x)
    return never_pooled(net, x)


@pytest.mark.parametrize("route", [pooled, never_pooled])
def test_a_pooler_that_the_loss_does_not_use(
    route: Callable[[Net, torch.Tensor], torch.Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    # The user asked for it to be trained.
    net = Net(saved=("pooler",))
    net.route = route
    error = fault(net, saved=("head", "pooler"))
    assert "1 of 2 got none in the first" in str(error)
    assert ": pooler." in str(error)
    assert error.problems[0].key == "lora.modules_to_save"
    # Nobody did: the base came without it.
    net = Net(saved=("pooler",))
    net.route = route
    watch = AdapterWatch(net, ("head", "pooler"), may_be_unused=("head", "pooler"))
    with caplog.at_level(logging.WARNING, logger="lora_cli"):
        train(net, watch, steps=30)
    assert [r.getMessage() for r in caplog.records] == [
        "note: the loss does not depend on pooler, whose weights the base lacks: it is saved as "
        "it started"
    ]


def test_a_loss_past_every_new_module_is_an_error() -> None:
    net = Net()
    net.forward = lambda x: net.two(net.one(x))  # type: ignore[method-assign]
    error = fault(net, may_be_unused=("head",))
    assert "1 of 1 got none in the first 20 steps: head." in str(error)


def test_a_head_of_which_a_part_is_unused() -> None:
    net = Net()
    net.head.register_parameter("spare", nn.Parameter(torch.ones(3)))
    error = fault(net)
    assert "1 of 3 had none but zero throughout the first 20 steps: head.spare." in str(error)


def test_a_part_of_the_head_whose_gradient_is_zero() -> None:
    net = Net()
    net.head = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    nn.init.constant_(net.head[0].bias, -100.0)
    dead = "head.0.bias, head.0.weight, head.2.weight."
    assert f"3 of 4 had none but zero throughout the first 20 steps: {dead}" in str(fault(net))


def test_a_body_module_may_have_unused_parts() -> None:
    """Of what is trained whole in the body, something must learn, but not everything."""
    net = Net(saved=("one.base_layer",))
    net.one.base_layer.register_parameter("spare", nn.Parameter(torch.ones(3)))
    watch = AdapterWatch(net, ("head", "one.base_layer"))
    assert train(net, watch, steps=30) == LAST_STEP


@pytest.mark.parametrize("strategy", ["adapter", "prefix"])
def test_what_other_strategies_add(
    tiny_model_dir: ModelDir, strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = AdapterStrategyConfig(size=4) if strategy == "adapter" else PrefixStrategyConfig()
    for is_cut in (False, True):
        model = AutoModelForSequenceClassification.from_pretrained(tiny_model_dir(), num_labels=2)
        applied = apply_strategy(model, config, ("classifier",), seed=0)
        if is_cut:
            block = model.bert.encoder.layer[1]
            block.register_forward_hook(lambda _m, _i, output: output.detach())
        watch = AdapterWatch(model.train(), applied.saved)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
        ended = None
        for step in range(1, 5):
            torch.manual_seed(step)
            ids = torch.randint(5, 30, (4, 6))
            model(input_ids=ids, labels=torch.tensor([0, 1, 1, 0])).loss.backward()
            watch.look()
            optimizer.step()
            if is_cut and step == 3:
                with pytest.raises(RunFailedError, match="ran without the loss depending") as e:
                    watch.confirm(last=False)
                assert e.value.problems[0].key == "strategy"
                assert "lora.exclude" not in str(e.value)
                break
            ended = ended or watch.confirm(last=False)
            optimizer.zero_grad()
        assert is_cut != bool(ended)


@pytest.mark.parametrize("is_cut", [False, True])
def test_weights_of_the_base(is_cut: bool) -> None:
    """A pooler that is trained with the rest and not used is usual; nothing that learns is not."""
    net = Net(saved=("pooler",))
    net.one, net.two = nn.Linear(4, 4), nn.Linear(4, 4)
    net.route = lambda net, x: net.two(net.one(x)).detach() if is_cut else pooled(net, x)
    if is_cut:
        assert "all 6 beside the head had none" in str(fault(net, steps=4))
    else:
        assert train(net, AdapterWatch(net, ("head",)), steps=30) == LAST_STEP


def test_rows_of_tokens_that_have_not_occurred() -> None:
    class Rows(AdapterLayer):
        def __init__(self) -> None:
            super().__init__()
            self.base_layer = nn.Embedding(9, 4).requires_grad_(False)
            self.delta = nn.Parameter(torch.zeros(1, 4))

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.base_layer(ids) + (ids == 8)[..., None] * self.delta
            return y

    model = nn.Sequential(Rows(), nn.Linear(4, 2))
    watch = AdapterWatch(model, ("1",))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for step in range(LAST_STEP):
        optimizer.zero_grad()
        model(torch.tensor([[0, 1, 2]])).square().sum().backward()
        watch.look()
        optimizer.step()
        assert watch.confirm(last=False) == (step == LAST_STEP - 1)

"""Adapters from files in their base model; every command goes through here."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from lora_cli.artifacts.tuned import Tuned
from lora_cli.commands.attaching import attach_adapter
from lora_cli.commands.opening import Opened, open_adapter
from lora_cli.config.strategies import (
    AdapterStrategyConfig,
    BitFitStrategyConfig,
    HeadStrategyConfig,
    LoraThenFullStrategyConfig,
    PrefixStrategyConfig,
)
from lora_cli.errors import UserError
from lora_cli.lora.state import adapter_state
from lora_cli.lora.strategies import apply_strategy

IDS = torch.tensor([[2, 11, 45, 3]])


@pytest.fixture
def opened(tiny_run: Any) -> Opened:
    return open_adapter(str(tiny_run.path), base=None)


def tuned_by(opened: Opened, strategy: Any) -> tuple[Tuned, torch.Tensor]:
    """What a strategy would have saved, and what its model says."""
    model = open_adapter(str(opened.subject.adapter), base=str(opened.source.folder)).base.model
    applied = apply_strategy(model, strategy, ("bert.pooler", "classifier"), seed=5)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
        logits: torch.Tensor = model(IDS).logits
    return Tuned(state=adapter_state(model, applied.saved), prefix=applied.prefix), logits


@pytest.mark.parametrize(
    "strategy",
    [
        HeadStrategyConfig(),
        BitFitStrategyConfig(),
        AdapterStrategyConfig(size=4),
        PrefixStrategyConfig(num_tokens=3),
        LoraThenFullStrategyConfig(),
    ],
)
def test_a_model_is_put_together_again(opened: Opened, strategy: Any) -> None:
    tuned, logits = tuned_by(opened, strategy)
    config = replace(opened.config, strategy=strategy)
    model = attach_adapter(opened.base, tuned, config, where="here")
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, logits)


def test_low_rank_updates_belong_to_either_strategy_that_makes_them(opened: Opened) -> None:
    config = replace(opened.config, strategy=LoraThenFullStrategyConfig())
    model = attach_adapter(opened.base, opened.adapter, config, where="here")
    again = open_adapter(str(opened.subject.adapter), base=str(opened.source.folder)).attach()
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, again(IDS).logits)


@pytest.mark.parametrize("strategy", [HeadStrategyConfig(), PrefixStrategyConfig()])
def test_low_rank_updates_are_of_no_other_strategy(opened: Opened, strategy: Any) -> None:
    config = replace(opened.config, strategy=strategy)
    with pytest.raises(UserError, match=f"strategy={strategy.name} does not write such files"):
        attach_adapter(opened.base, opened.adapter, config, where="here")
    assert not hasattr(opened.base.model, "prefix_tuning")


def test_tuned_tensors_are_no_low_rank_updates(opened: Opened) -> None:
    tuned, _ = tuned_by(opened, HeadStrategyConfig())
    with pytest.raises(UserError, match="strategy=lora does not write such files"):
        attach_adapter(opened.base, tuned, opened.config, where="here")


def test_tensors_that_are_missing_or_too_many_are_named(opened: Opened) -> None:
    tuned, _ = tuned_by(opened, HeadStrategyConfig())
    config = replace(opened.config, strategy=HeadStrategyConfig())
    state = dict(tuned.state)
    del state["classifier.bias"]
    state["stray"] = torch.ones(1)
    with pytest.raises(UserError) as caught:
        attach_adapter(opened.base, Tuned(state=state), config, where="here")
    messages = " ".join(problem.message for problem in caught.value.problems)
    assert "lacks: classifier.bias" in messages
    assert "but has: stray" in messages
    assert {problem.where for problem in caught.value.problems} == {"here"}

from typing import Any

import pytest

from lora_cli.config.commands import VARIANTS
from lora_cli.config.groups import group_options

NAMES = ["lora", "full", "head", "top", "bitfit", "lora_then_full", "adapter", "prefix"]


def test_each_strategy_has_an_option() -> None:
    assert list(VARIANTS["strategy"][1]) == NAMES
    assert set(group_options("strategy")) == set(NAMES)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["strategy=top", "strategy.layers=3"], {"name": "top", "layers": 3}),
        (
            ["strategy=lora_then_full", "strategy.full_epochs=2"],
            {"name": "lora_then_full", "full_lr": 2e-5, "full_epochs": 2},
        ),
        (
            ["strategy=adapter", "strategy.placement=houlsby"],
            {"name": "adapter", "size": 64, "placement": "houlsby"},
        ),
        (["strategy=prefix"], {"name": "prefix", "num_tokens": 20}),
        ([], {"name": "lora"}),
    ],
)
def test_strategies_compose(
    compose_all: Any, overrides: list[str], expected: dict[str, Any]
) -> None:
    (composed,) = compose_all("train", "model=bert", "task=sst2", *overrides)
    assert composed.plain["strategy"] == expected


def test_a_strategy_has_its_own_settings_only(problems_of: Any) -> None:
    (problem,) = problems_of("train", "model=bert", "task=sst2", "strategy=top", "strategy.size=3")
    assert (problem.key, problem.allowed) == ("strategy.size", "strategy.layers")

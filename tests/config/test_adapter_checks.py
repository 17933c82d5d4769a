from typing import Any

import pytest

NAMED = ("train", "model=bert", "task=sst2")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("top-4", ("top-4",)),
        ("8-11", ("8-11",)),
        ("-1", (-1,)),
        ("[0,-2,3-3,top-1]", (0, -2, "3-3", "top-1")),
        ("null", None),
    ],
)
def test_layers_are_numbers_ranges_and_top(compose_all: Any, value: str, expected: Any) -> None:
    (composed,) = compose_all(*NAMED, f"lora.layers={value}")
    assert composed.config.lora.layers == expected


@pytest.mark.parametrize(
    "value", ["[]", "8-4", "top-0", "top", "-4--1", "last", "[0,'1']", "1-", "''", "top-4-5"]
)
@pytest.mark.parametrize("command", [NAMED, ("targets", "model=bert")])
def test_other_layers_are_refused(problems_of: Any, command: tuple[str, ...], value: str) -> None:
    (problem,) = problems_of(*command, f"lora.layers={value}")
    assert (problem.id, problem.key) == ("config.bad-value", "lora.layers")
    assert '"8-11"' in problem.allowed


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["lora.adalora.warmup_ratio=0.7"], "lora.adalora.warmup_ratio"),
        (["lora.adalora.final_ratio=0.9"], "lora.adalora.final_ratio"),
        (["lora.adalora.init_r=7"], "lora.adalora.init_r"),
        (["lora.r=13", "lora.adalora.init_r=12"], "lora.adalora.init_r"),
    ],
)
def test_adalora_has_ranks_and_steps(problems_of: Any, overrides: list[str], key: str) -> None:
    assert [problem.key for problem in problems_of(*NAMED, "lora=adalora", *overrides)] == [key]


def test_adalora_up_to_the_bounds(compose_all: Any) -> None:
    line = ("lora=adalora", "lora.adalora.warmup_ratio=0.69", "lora.adalora.init_r=8")
    assert len(compose_all(*NAMED, *line)) == 1


def test_fused_weights_have_no_dropout_and_no_bias(problems_of: Any, compose_all: Any) -> None:
    line = (*NAMED, "lora.target_parameters=experts.down_proj")
    assert len(compose_all(*line, "lora.targets=[]")) == 1
    found = problems_of(*line, "lora.dropout=0.1", "lora.lora_bias=true")
    assert [problem.key for problem in found] == ["lora.dropout", "lora.lora_bias"]


@pytest.mark.parametrize("strategy", ["full", "head", "top", "bitfit", "adapter", "prefix"])
def test_only_lora_goes_on_with_an_adapter(
    problems_of: Any, compose_all: Any, strategy: str
) -> None:
    (problem,) = problems_of(*NAMED, f"strategy={strategy}", "adapter=runs/a")
    assert problem.key == "adapter"
    assert f"strategy={strategy}" in problem.message
    line = (*NAMED, f"strategy={strategy}", "adapter=runs/a", "adapter_mode=merge")
    assert len(compose_all(*line)) == 1


@pytest.mark.parametrize("strategy", ["lora", "lora_then_full"])
def test_lora_goes_on_with_an_adapter(compose_all: Any, strategy: str) -> None:
    (composed,) = compose_all(*NAMED, f"strategy={strategy}", "adapter=runs/a")
    assert composed.config.adapter_mode == "continue"

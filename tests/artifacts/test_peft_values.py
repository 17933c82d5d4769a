import json
import time
from typing import Any

import pytest

from lora_cli.artifacts.peft_methods import METHODS
from lora_cli.artifacts.peft_values import check_values


def config(method: str, **fields: Any) -> dict[str, Any]:
    needed = {"target_modules": ["query"]} | ({"total_step": 20} if method == "ADALORA" else {})
    return {**METHODS[method].read, **needed, **fields}


@pytest.mark.parametrize("method", METHODS)
def test_the_defaults_are_fine(method: str) -> None:
    assert check_values(config(method), where="x") == []


@pytest.mark.parametrize(
    ("method", "fields"),
    [
        ("ADALORA", {"init_r": 0}),
        ("ADALORA", {"init_r": None}),
        ("ADALORA", {"target_r": 2.5}),
        ("ADALORA", {"total_step": None}),
        ("ADALORA", {"total_step": 0}),
        ("ADALORA", {"tinit": -1}),
        ("ADALORA", {"tinit": "0"}),
        ("ADALORA", {"tinit": 15, "tfinal": 5}),
        ("ADALORA", {"tfinal": True}),
        ("ADALORA", {"deltaT": 0}),
        ("ADALORA", {"beta1": 1}),
        ("ADALORA", {"beta2": 0.0}),
        ("ADALORA", {"orth_reg_weight": -1}),
        ("ADALORA", {"orth_reg_weight": float("nan")}),
        ("ADALORA", {"bias": "vera_only"}),
        ("ADALORA", {"rank_pattern": {"query.lora_E": 3}}),
        ("ADALORA", {"rank_pattern": {"query.lora_E": [1] * 12}}),
        ("ADALORA", {"rank_pattern": {"query.lora_E": [True] * 11}}),
        ("ADALORA", {"rank_pattern": {"(a+)+b": [True] * 12}}),
        ("ADALORA", {"rank_pattern": [True]}),
        ("VERA", {"r": 0}),
        ("VERA", {"vera_dropout": 1.0}),
        ("VERA", {"d_initial": "0.1"}),
        ("VERA", {"d_initial": float("inf")}),
        ("VERA", {"projection_prng_key": -1}),
        ("VERA", {"projection_prng_key": 0.5}),
        ("VERA", {"projection_prng_key": 2**64}),
        ("VERA", {"bias": "lora_only"}),
        ("VERA", {"target_modules": None}),
        ("LORA", {"bias": "vera_only"}),
        ("LORA", {"rank_pattern": {"query": [True]}}),
    ],
    ids=json.dumps,
)
def test_wrong_values(method: str, fields: dict[str, Any]) -> None:
    (problem,) = check_values(config(method, **fields), where="x")
    assert problem.id == "adapter.bad-value"
    assert f'"{next(iter(fields))}" must be ' in problem.message
    assert problem.where == "x"


def test_masks_of_every_layer_and_of_none() -> None:
    masks = {"a.query.lora_E": [True] * 12, "b.query.lora_E": [False] * 12}
    assert check_values(config("ADALORA", rank_pattern=masks), where="x") == []
    assert check_values(config("ADALORA", rank_pattern={}), where="x") == []


def test_names_are_no_regular_expressions_and_none_is_run() -> None:
    start = time.perf_counter()
    problems = check_values(
        config("VERA", target_modules="(a+)+b", layers_pattern="(a+)+b"), where="x"
    )
    assert time.perf_counter() - start < 1.0
    assert sorted(problem.id for problem in problems) == ["adapter.bad-value", "adapter.regex"]

"""Combining against PEFT's `add_weighted_adapter`; algebra is in test_combine_algebra.py."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_cli.lora.combine import METHODS, Blend, Method, combine_factors
from lora_cli.lora.factors import Factors

# What PEFT says of its own accord about a layer of transformers, and about a density of 1.
pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out"),
    pytest.mark.filterwarnings("ignore:The density"),
]

BY_ENTRY: tuple[Method, ...] = tuple(m for m in METHODS if m not in ("cat", "svd"))
LAYERS = ("conv", "dense", "embed", "linear")


class Mixed(nn.Module):
    """One layer of each kind, in the order of their names."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.dense = Conv1D(9, 6)
        self.embed = nn.Embedding(20, 6)
        self.linear = nn.Linear(7, 5)


def peft_pair(
    *, r: Sequence[int] = (4, 4), targets: Sequence[Sequence[str]] = (LAYERS, LAYERS)
) -> PeftModel:
    """A model with the random adapters "first" and "second", which differ in strength too."""
    torch.manual_seed(0)
    configs = [
        LoraConfig(
            r=r[index],
            lora_alpha=alpha,
            target_modules=list(targets[index]),
            fan_in_fan_out=False,
            use_rslora=bool(index),
        )
        for index, alpha in enumerate((6, 3))
    ]
    model = get_peft_model(Mixed(), configs[0], adapter_name="first")
    model.add_adapter("second", configs[1])
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)
    return model


def factors_of(model: Any, adapter: str) -> dict[str, Factors]:
    found = {}
    for name in LAYERS:
        layer = getattr(model.base_model.model, name)
        if adapter in getattr(layer, "lora_A", {}):
            a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        elif adapter in getattr(layer, "lora_embedding_A", {}):
            a, b = layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
        else:
            continue
        found[name] = Factors(
            A=a.detach(), B=b.detach(), scale=layer.scaling[adapter], is_embedding=name == "embed"
        )
    return found


def combined_by_peft(
    model: Any, weights: Sequence[float], method: str, *, seed: int = 42, **kwargs: Any
) -> dict[str, Factors]:
    inject = model.base_model.inject_adapter

    def inject_then_seed(*args: Any, **kwargs: Any) -> None:
        # The new layers start at random; the masks of DARE are to be drawn from a fresh seed.
        inject(*args, **kwargs)
        torch.manual_seed(seed)

    model.base_model.inject_adapter = inject_then_seed
    model.add_weighted_adapter(
        ["first", "second"], list(weights), "both", combination_type=method, **kwargs
    )
    return factors_of(model, "both")


def product(factors: Factors) -> torch.Tensor:
    """The update as (out, everything else), group by group."""
    g = factors.groups
    a = factors.A.double().reshape(g, factors.r // g, -1)
    b = factors.B.double().reshape(g, -1, factors.r // g)
    return factors.scale * (b @ a).reshape(factors.B.shape[0], -1)


def assert_equal(ours: dict[str, Factors], theirs: dict[str, Factors]) -> None:
    assert list(ours) == list(theirs)
    for name, mine in ours.items():
        assert mine.scale == 1.0
        assert mine.is_embedding == theirs[name].is_embedding
        torch.testing.assert_close(mine.A, theirs[name].A, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(mine.B, theirs[name].B, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("weights", [(0.7, 0.3), (1.0, -0.5), (2.0, 0.0)])
@pytest.mark.parametrize(
    ("method", "density", "sign"),
    [
        ("linear", 0.5, "total"),
        *(
            (method, density, sign)
            for method in BY_ENTRY
            if method != "linear"
            for density in (0.3, 1.0)
            for sign in (("total", "frequency") if method.endswith("ties") else ("total",))
        ),
    ],
)
def test_methods_by_entry_give_what_peft_gives(
    method: Method, density: float, sign: Any, weights: tuple[float, float]
) -> None:
    model = peft_pair()
    how = Blend(weights=weights, method=method, density=density, majority_sign=sign, seed=7)
    ours = combine_factors([factors_of(model, "first"), factors_of(model, "second")], how)
    keywords: dict[str, Any] = {} if method == "linear" else {"density": density}
    if method.endswith("ties"):
        keywords["majority_sign_method"] = sign
    assert_equal(ours, combined_by_peft(model, weights, method, seed=7, **keywords))
    assert ours["embed"].is_embedding


@pytest.mark.parametrize("weights", [(0.7, 0.3), (1.0, -0.5)])
def test_cat_gives_what_peft_gives(weights: tuple[float, float]) -> None:
    model = peft_pair(r=(4, 2))
    parts = [factors_of(model, "first"), factors_of(model, "second")]
    ours = combine_factors(parts, Blend(weights=weights, method="cat"))
    assert_equal(ours, combined_by_peft(model, weights, "cat"))
    for name, mine in ours.items():
        expected = weights[0] * product(parts[0][name]) + weights[1] * product(parts[1][name])
        torch.testing.assert_close(product(mine), expected, rtol=1e-5, atol=1e-5)
        assert mine.r == 6


@pytest.mark.parametrize("r", [None, 1, 3])
def test_svd_gives_the_product_that_peft_gives(r: int | None) -> None:
    model = peft_pair(r=(4, 2))
    parts = [factors_of(model, "first"), factors_of(model, "second")]
    ours = combine_factors(parts, Blend(weights=(0.7, -0.3), method="svd", r=r))
    theirs = combined_by_peft(model, (0.7, -0.3), "svd", svd_rank=r)
    for name, mine in ours.items():
        theirs[name] = Factors(A=theirs[name].A, B=theirs[name].B, scale=1.0)
        assert mine.A.shape == theirs[name].A.shape
        assert mine.B.shape == theirs[name].B.shape
        torch.testing.assert_close(product(mine), product(theirs[name]), rtol=1e-4, atol=1e-4)


def test_a_layer_that_one_adapter_lacks() -> None:
    for method in METHODS:
        model = peft_pair(targets=(("conv", "linear"), ("embed", "linear")))
        parts = [factors_of(model, "first"), factors_of(model, "second")]
        how = Blend(weights=(0.7, 0.3), method=method, seed=42)
        ours = combine_factors(parts, how)
        assert list(ours) == ["conv", "embed", "linear"]
        keywords: dict[str, Any] = {"density": 0.5} if method in BY_ENTRY else {}
        theirs = combined_by_peft(model, (0.7, 0.3), method, **keywords)
        for name, mine in ours.items():
            theirs[name] = Factors(A=theirs[name].A, B=theirs[name].B, scale=1.0)
            torch.testing.assert_close(product(mine), product(theirs[name]), rtol=1e-4, atol=1e-4)

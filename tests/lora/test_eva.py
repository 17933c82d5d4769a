"""EVA against NumPy's SVD of the collected inputs, and against PEFT's implementation."""

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from peft import EvaConfig, get_peft_model, initialize_lora_eva_weights
from peft import LoraConfig as PeftConfig
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from lora_cli.errors import UserError
from lora_cli.lora.eva import (
    eva_factors,
    eva_settings,
    input_spectra,
    start_from_inputs,
)
from lora_cli.lora.inject import inject_lora
from lora_cli.lora.settings import LoraSettings, scale_of
from lora_cli.lora.state import adapter_state

# peft 0.21 asks transformers for a property that transformers 5 has renamed.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)
HIDDEN = 32


def tiny_bert() -> Any:
    torch.manual_seed(5)
    config = BertConfig(
        vocab_size=60,
        hidden_size=HIDDEN,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=HIDDEN,
        max_position_embeddings=32,
        initializer_range=0.3,
        num_labels=3,
    )
    return BertForSequenceClassification(config).eval()


def layers_of(model: nn.Module, *lasts: str) -> list[str]:
    return [name for name, _ in model.named_modules() if name.rpartition(".")[2] in lasts]


def batches(count: int, *, rows: int = 16, length: int = 12) -> list[dict[str, torch.Tensor]]:
    """Token ids, with padding that the mask hides."""
    generator = torch.Generator().manual_seed(3)
    found = []
    for _ in range(count):
        ids = torch.randint(1, 60, (rows, length), generator=generator)
        lengths = torch.randint(4, length + 1, (rows, 1), generator=generator)
        mask = (torch.arange(length)[None] < lengths).long()
        found.append({"input_ids": ids * mask, "attention_mask": mask})
    return found


def collected(model: Any, names: list[str], data: list[Any]) -> dict[str, np.ndarray]:
    """What each layer is given at positions that count, as float64 rows."""
    seen: dict[str, list[np.ndarray]] = {name: [] for name in names}
    mask = None

    def watch(name: str) -> Any:
        def look(_module: nn.Module, args: Any, _output: Any) -> None:
            seen[name].append(args[0][mask.bool()].double().numpy())

        return look

    handles = [model.get_submodule(name).register_forward_hook(watch(name)) for name in names]
    with torch.no_grad():
        for batch in data:
            mask = batch["attention_mask"]
            model(**batch)
    for handle in handles:
        handle.remove()
    return {name: np.concatenate(parts) for name, parts in seen.items()}


def principal(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Shares of the variance and right singular vectors, by NumPy."""
    _, values, rows = np.linalg.svd(x - x.mean(axis=0), full_matrices=False)
    return values**2 / (values**2).sum(), rows


def smallest_cosine(first: Any, second: Any) -> float:
    """Cosine of the largest principal angle between the row spaces of two matrices."""
    bases = [np.linalg.qr(np.asarray(rows, dtype=np.float64).T)[0] for rows in (first, second)]
    return float(np.linalg.svd(bases[0].T @ bases[1])[1].min())


@pytest.mark.parametrize("rho", [1.0, 2.0])
def test_ranks_and_directions_are_those_of_the_collected_inputs(rho: float) -> None:
    model, data = tiny_bert(), batches(3)
    names = layers_of(model, "query", "dense")
    names.remove("bert.pooler.dense")
    ranks = LoraSettings(r=4, alpha=6.0, rank_pattern={"query": 3})
    factors = eva_factors(
        model, names, ranks, batches=data, forward=lambda batch: model(**batch), rho=rho
    )
    inputs = {name: principal(x) for name, x in collected(model, names, data).items()}
    best = sorted(
        (-share, place, name)
        for place, name in enumerate(names)
        for share in inputs[name][0][: round(rho * ranks.r_of(name))]
    )
    budget = sum(ranks.r_of(name) for name in names)
    expected = {name: sum(n == name for *_, n in best[:budget]) for name in names}
    assert {name: len(A) for name, A in factors.items()} == {n: r for n, r in expected.items() if r}
    assert sum(expected.values()) == budget
    if rho == 1:
        assert expected == {name: ranks.r_of(name) for name in names}
    else:
        assert len(set(expected.values())) > 1
    for name, A in factors.items():
        assert A.dtype == torch.float32
        assert A.shape == (expected[name], HIDDEN)
        assert smallest_cosine(A, inputs[name][1][: len(A)]) > 1 - 1e-6
        torch.testing.assert_close(A @ A.T, torch.eye(len(A)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("rho", [1.0, 1.5, 2.0])
def test_ranks_subspaces_and_scales_are_those_of_peft(rho: float) -> None:
    base, data = tiny_bert(), batches(1)
    # PEFT's randomized SVD finds 2 rho r directions: all 32 only with the largest rho.
    exact = rho == 2
    config = PeftConfig(
        r=8,
        lora_alpha=12,
        target_modules=["query", "value", "intermediate.dense"],
        init_lora_weights="eva",
        eva_config=EvaConfig(rho=rho),
    )
    theirs = get_peft_model(copy.deepcopy(base), config, low_cpu_mem_usage=True)
    initialize_lora_eva_weights(theirs, data, show_progress_bar=False)
    his = {
        name.removeprefix("base_model.model.").removesuffix(".lora_A.default.weight"): tensor
        for name, tensor in theirs.named_parameters()
        if ".lora_A." in name
    }

    names = [n for n in layers_of(base, "query", "value", "dense") if "output" not in n]
    names.remove("bert.pooler.dense")
    before = LoraSettings(r=8, alpha=12.0)
    ours = eva_factors(
        base, names, before, batches=data, forward=lambda batch: base(**batch), rho=rho
    )
    assert {name: len(A) for name, A in ours.items()} == {n: len(A) for n, A in his.items()}
    assert rho == 1 or len({len(A) for A in ours.values()}) > 1
    after = eva_settings(before, ours)
    for name, A in ours.items():
        assert smallest_cosine(A, his[name].detach()) > 1 - (1e-5 if exact else 1e-3)
        layer: Any = theirs.get_submodule(f"base_model.model.{name}")
        assert layer.r["default"] == after.r_of(name)
        assert layer.lora_alpha["default"] == pytest.approx(after.alpha_of(name))
        scale = scale_of(after.r_of(name), after.alpha_of(name), rslora=False)
        assert layer.scaling["default"] == pytest.approx(scale) == pytest.approx(12 / 8)


def test_hidden_positions_do_not_count() -> None:
    model, data = tiny_bert(), batches(2)
    names = layers_of(model, "query")[:1]

    def factors(rows: list[Any]) -> torch.Tensor:
        found = eva_factors(
            model,
            names,
            LoraSettings(r=4, alpha=4.0),
            batches=rows,
            forward=lambda batch: model(**batch),
            rho=1.0,
        )
        return found[names[0]]

    # The first block sees embeddings: what stands at hidden positions reaches no other position.
    noisy = [dict(batch) for batch in data]
    for batch in noisy:
        hidden = batch["attention_mask"] == 0
        batch["input_ids"] = torch.where(
            hidden, torch.full_like(hidden, 7, dtype=torch.long), batch["input_ids"]
        )
    assert torch.equal(factors(data), factors(noisy))
    # A mask inside another mapping, as batches of a task hold it, counts as well.
    nested = [{"inputs": batch, "ids": ["a"]} for batch in data]
    found = input_spectra(
        model, {names[0]: 4}, batches=nested, forward=lambda b: model(**b["inputs"]), rho=1.0
    )
    assert torch.equal(found[names[0]].directions(4), factors(data))
    blind = [{"input_ids": batch["input_ids"]} for batch in noisy]
    assert not torch.allclose(factors(data), factors(blind), atol=1e-3)


def test_layers_with_the_same_input_share_one_spectrum() -> None:
    model = tiny_bert()
    names = layers_of(model, "query", "key", "value", "dense")
    names = [name for name in names if "layer." in name]
    found = input_spectra(
        model,
        dict.fromkeys(names, 2),
        batches=batches(2),
        forward=lambda batch: model(**batch),
        rho=2.0,
    )
    assert list(found) == names
    assert len({id(spectrum) for spectrum in found.values()}) == 3 * (1 + 3)
    for index in range(3):
        self = f"bert.encoder.layer.{index}.attention.self"
        assert found[f"{self}.query"] is found[f"{self}.key"] is found[f"{self}.value"]


def test_an_input_that_was_changed_in_place_is_another() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            first = self.a(x)
            return first + self.b(x.mul_(torch.arange(6)))

    model = Model()
    found = input_spectra(
        model,
        {"a": 2, "b": 2},
        batches=[torch.randn(30, 6)],
        forward=lambda x: model(x.clone()),
        rho=1.0,
    )
    assert found["a"] is not found["b"]
    assert found["a"].shares != found["b"].shares


def test_hooks_and_modes_are_gone_afterwards() -> None:
    model, names = tiny_bert(), ["bert.pooler.dense"]
    with pytest.raises(RuntimeError, match="broken"):
        input_spectra(model, {names[0]: 2}, batches=_broken(), forward=lambda b: b, rho=1.0)
    assert not any(module._forward_pre_hooks for module in model.modules())


def _broken() -> Iterator[Any]:
    yield {}
    raise RuntimeError("broken")


def test_too_few_rows_are_refused() -> None:
    model = tiny_bert()
    names = layers_of(model, "query")
    with pytest.raises(UserError) as caught:
        eva_factors(
            model,
            names,
            LoraSettings(r=8, alpha=8.0),
            batches=batches(1, rows=1, length=6),
            forward=lambda batch: model(**batch),
            rho=2.0,
        )
    (problem,) = caught.value.problems
    assert problem.key == "lora.eva.rows"
    assert '"bert.encoder.layer.0.attention.self.query"' in problem.message


def test_inputs_that_are_no_numbers_are_refused() -> None:
    model = tiny_bert()
    model.bert.embeddings.LayerNorm.weight.data[0] = torch.inf
    with pytest.raises(UserError) as caught:
        input_spectra(
            model,
            dict.fromkeys(layers_of(model, "query"), 2),
            batches=batches(1),
            forward=lambda batch: model(**batch),
            rho=1.0,
        )
    assert '"bert.encoder.layer.0.attention.self.query"' in caught.value.problems[0].message


def test_other_layers_than_linear_ones_are_refused() -> None:
    model = tiny_bert()
    with pytest.raises(UserError) as caught:
        eva_factors(
            model,
            ["bert.embeddings.word_embeddings", *layers_of(model, "query")],
            LoraSettings(r=8, alpha=8.0),
            batches=[],
            forward=lambda batch: model(**batch),
            rho=2.0,
        )
    (problem,) = caught.value.problems
    assert problem.key == "lora.init"
    assert '"bert.embeddings.word_embeddings" (Embedding)' in problem.message
    assert "lora.exclude=[word_embeddings]" in str(problem.fix)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("variant", ["lora", "dora", "lora_fa"])
def test_factors_start_the_layers_and_the_scale_stays(variant: str, rslora: bool) -> None:
    model, data = tiny_bert(), batches(2)
    plain = copy.deepcopy(model)
    names = layers_of(model, "query", "value")
    before = LoraSettings(
        r=4, alpha=6.0, variant=variant, rslora=rslora, init="eva", alpha_pattern={"value": 9.0}
    )
    factors = eva_factors(
        model, names, before, batches=data, forward=lambda batch: model(**batch), rho=2.0
    )
    after = eva_settings(before, factors)
    inject_lora(model, list(factors), after)
    start_from_inputs(model, factors)
    state = adapter_state(model, ())
    assert {name.rpartition(".lora_A")[0] for name in state if ".lora_A." in name} == set(factors)
    for name, A in factors.items():
        assert torch.equal(state[f"{name}.lora_A.weight"], A)
        assert not state[f"{name}.lora_B.weight"].any()
        scale = scale_of(4, before.alpha_of(name), rslora=rslora)
        assert model.get_submodule(name).scale == pytest.approx(scale)
    with torch.no_grad():
        logits = [m(**data[0]).logits for m in (model, plain)]
    torch.testing.assert_close(*logits, atol=1e-5, rtol=0)


def test_the_same_rows_give_the_same_factors_to_the_last_bit() -> None:
    first, second = (
        eva_factors(
            model,
            layers_of(model, "query", "dense"),
            LoraSettings(r=4, alpha=6.0),
            batches=batches(3),
            forward=lambda batch, model=model: model(**batch),
            rho=2.0,
        )
        for model in (tiny_bert(), tiny_bert())
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)

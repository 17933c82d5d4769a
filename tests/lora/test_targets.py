import time

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification

from lora_cli.errors import UserError
from lora_cli.lora.targets import (
    ResolvedTargets,
    Targets,
    UnmatchedTargetsError,
    match_targets,
    resolve_targets,
)

CONFIG = BertConfig(
    vocab_size=20,
    hidden_size=8,
    num_hidden_layers=12,
    num_attention_heads=2,
    intermediate_size=8,
    num_labels=3,
)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    with torch.device("meta"):
        return BertForSequenceClassification(CONFIG)


def resolve(
    model: nn.Module,
    targets: Targets,
    *,
    exclude: tuple[str, ...] = (),
    auto: tuple[str, ...] | None = ("query", "value"),
    saved: tuple[str, ...] = ("classifier",),
) -> ResolvedTargets:
    return resolve_targets(model, targets=targets, exclude=exclude, auto=auto, saved_modules=saved)


def test_auto_takes_the_family_names_in_module_order(model: nn.Module) -> None:
    resolved = resolve(model, "auto")
    assert resolved.counts == {"query": 12, "value": 12}
    # Layer 2 comes before layer 10: module order, not the order of text.
    assert resolved.names == tuple(
        f"bert.encoder.layer.{i}.attention.self.{part}"
        for i in range(12)
        for part in ("query", "value")
    )


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        ("query", 12),
        ("self.query", 12),
        ("bert.encoder.layer.3.attention.self.query", 1),
        ("1.attention.self.query", 1),  # whole parts: not layer 11
        ("attention.output.dense", 12),
        ("dense", 37),  # three of each layer and the pooler
        ("*.layer.0.*", 6),
        ("q*", 12),
        ("*self.[qk]*", 24),
    ],
)
def test_patterns(model: nn.Module, pattern: str, count: int) -> None:
    resolved = resolve(model, (pattern,))
    assert resolved.counts == {pattern: count}
    assert len(resolved.names) == count


@pytest.mark.parametrize("pattern", ["uery", "Query", "bert", "query.", "encoder.layer.0", "self"])
def test_near_misses_match_nothing(model: nn.Module, pattern: str) -> None:
    with pytest.raises(UnmatchedTargetsError):
        resolve(model, (pattern,))


def test_every_unmatched_pattern_is_reported_with_the_nearest_name(model: nn.Module) -> None:
    with pytest.raises(UnmatchedTargetsError) as caught:
        resolve(model, ("qurey", "value", "zzzz"), exclude=("dnse",))
    error = caught.value
    assert error.exit_code == 2
    assert error.patterns == ("qurey", "zzzz", "dnse")
    assert error.known == ("classifier", "dense", "key", "query", "value")
    assert [(p.id, p.key) for p in error.problems] == [
        ("lora.unmatched-target", "lora.targets"),
        ("lora.unmatched-target", "lora.targets"),
        ("lora.unmatched-target", "lora.exclude"),
    ]
    first = error.problems[0]
    assert first.message == (
        '`lora.targets` must name linear layers of the model, but "qurey" matches none.'
    )
    assert first.allowed == "dense, key, query, value"
    assert first.fix == 'did you mean "query"?'


def test_head_is_never_a_target(model: nn.Module) -> None:
    with pytest.raises(UnmatchedTargetsError, match="trained whole"):
        resolve(model, ("classifier",))
    assert resolve(model, ("classifier",), saved=()).names == ("classifier",)


def test_all_linear_leaves_out_saved_modules(model: nn.Module) -> None:
    resolved = resolve(model, "all-linear", saved=("bert.pooler", "classifier"))
    assert resolved.counts == {"all-linear": 72}
    assert not [n for n in resolved.names if n.startswith(("bert.pooler", "classifier"))]
    assert "bert.pooler.dense" in resolve(model, "all-linear").names


def test_all_linear_leaves_out_the_output_embedding() -> None:
    with torch.device("meta"):
        masked = BertForMaskedLM(CONFIG)
    names = resolve(masked, "all-linear", saved=()).names
    assert "cls.predictions.transform.dense" in names
    assert "cls.predictions.decoder" not in names


def test_tied_weight_is_refused() -> None:
    masked = BertForMaskedLM(CONFIG)
    with pytest.raises(UserError, match="shares its weight") as caught:
        resolve(masked, ("decoder",), saved=())
    assert caught.value.problems[0].id == "lora.tied-target"


def test_exclude(model: nn.Module) -> None:
    resolved = resolve(model, "auto", exclude=("*.layer.0.*", "value"))
    assert len(resolved.names) == 11
    assert "bert.encoder.layer.0.attention.self.query" not in resolved.names
    with pytest.raises(UserError, match="leaves none") as caught:
        resolve(model, "auto", exclude=("query", "value"))
    assert caught.value.problems[0].key == "lora.exclude"


def test_unknown_family(model: nn.Module) -> None:
    with pytest.raises(UserError) as caught:
        resolve(model, "auto", auto=None)
    assert caught.value.problems[0].key == "lora.targets"
    assert "query" in (caught.value.problems[0].allowed or "")


@pytest.mark.parametrize("pattern", ["", "x" * 201])
def test_pattern_lengths(model: nn.Module, pattern: str) -> None:
    with pytest.raises(UserError, match=r"1 to 200 characters") as caught:
        resolve(model, (pattern, "query"), exclude=(pattern,))
    assert [p.key for p in caught.value.problems] == ["lora.targets", "lora.exclude"]


def test_hostile_globs_are_fast(model: nn.Module) -> None:
    hostile = ("*a" * 100, "*" * 200, "[!" * 100, "(a+)+b", "*.*.*.*.*.*.*.*.*.*.*.*.*.*x")
    start = time.perf_counter()
    for pattern in hostile:
        match_targets(model, targets=(pattern,), saved_modules=())
    assert time.perf_counter() - start < 1.0


def test_attention_output_that_is_never_called_is_no_target() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16)
    assert resolve(layer, "all-linear", saved=()).names == ("linear1", "linear2")


def test_adapter_files_may_name_what_is_not_there(model: nn.Module) -> None:
    names = match_targets(
        model,
        targets=("query", "q_proj"),
        exclude=("layer.0.attention.self.query",),
        saved_modules=(),
    )
    assert len(names) == 11
    assert match_targets(model, targets=("q_proj",), saved_modules=()) == ()

from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    BertConfig,
    BertForSequenceClassification,
    MixtralModel,
)

from lora_cli.config.adapters import LoraConfig
from lora_cli.errors import UserError
from lora_cli.lora.planning import AdapterPlan, plan_adapter, put_adapter
from lora_cli.lora.settings import LoraSettings
from lora_cli.lora.state import adapter_state
from lora_cli.lora.targets import ResolvedTargets
from lora_cli.lora.tokens import TokenEmbedding

CONFIG = BertConfig(
    vocab_size=20, hidden_size=8, num_hidden_layers=3, num_attention_heads=2, intermediate_size=8
)
NEW = ("classifier.weight", "classifier.bias")
SELF = "bert.encoder.layer.{}.attention.self.{}"


@pytest.fixture
def model() -> Any:
    with torch.device("meta"):
        return BertForSequenceClassification(CONFIG)


def plan(model: Any, **settings: Any) -> AdapterPlan:
    new = NEW if hasattr(model, "classifier") else ()
    return plan_adapter(
        model,
        LoraConfig(**settings),
        new_keys=new,
        auto=("query", "value"),
        source="it's/here",
    )


def test_plain(model: Any) -> None:
    expected = tuple(SELF.format(i, part) for i in range(3) for part in ("query", "value"))
    found = plan(model)
    assert found.targets.names == expected
    assert found.saved == ("classifier",)
    assert found.parameters == found.short_parameters == ()


def test_everything_that_matches_nothing_is_reported_at_once(model: Any) -> None:
    before = {name: id(module) for name, module in model.named_modules()}
    with pytest.raises(UserError) as caught:
        plan(
            model,
            targets=("query", "vale"),
            exclude=("kee",),
            modules_to_save=("poler",),
            rank_pattern={"qurey": 4, "query": 2},
            alpha_pattern={"*.layer.7.*": 4.0},
            target_parameters=("experts.down_proj",),
            layers=(2,),
        )
    problems = caught.value.problems
    assert [problem.key for problem in problems] == [
        "lora.modules_to_save",
        "lora.targets",
        "lora.exclude",
        "lora.target_parameters",
        "lora.rank_pattern",
        "lora.alpha_pattern",
    ]
    command = "List all: lora-cli targets 'model.path=it'\"'\"'s/here'"
    assert problems[0].fix == 'did you mean "pooler"?'
    assert problems[1].fix == f'did you mean "value"? {command}'
    assert problems[2].fix == f'did you mean "key"? {command}'
    assert problems[4].fix == 'did you mean "query"?'
    assert {name: id(module) for name, module in model.named_modules()} == before


def test_a_block_that_is_not_there_is_reported_with_the_rest(model: Any) -> None:
    with pytest.raises(UserError) as caught:
        plan(model, layers=(3,), rank_pattern={"zz": 4})
    keys = [problem.key for problem in caught.value.problems]
    assert keys == ["lora.layers", "lora.rank_pattern"]


def test_patterns_of_ranks_must_select_layers_with_an_adapter(model: Any) -> None:
    plan(model, rank_pattern={"query": 4}, alpha_pattern={"*.layer.2.*": 4.0})
    with pytest.raises(UserError, match="matches only what gets no adapter") as caught:
        plan(model, rank_pattern={"key": 4}, alpha_pattern={"*.layer.2.*": 4.0}, layers=(0, 1))
    assert [problem.key for problem in caught.value.problems] == [
        "lora.rank_pattern",
        "lora.alpha_pattern",
    ]
    assert caught.value.problems[0].allowed == "query, value"


@pytest.mark.parametrize("pattern", ["", "x" * 201])
def test_lengths_of_patterns_of_ranks(model: Any, pattern: str) -> None:
    with pytest.raises(UserError, match="1 to 200 characters") as caught:
        plan(model, rank_pattern={pattern: 4})
    assert caught.value.problems[0].key == "lora.rank_pattern"


def test_a_pattern_that_earlier_ones_leave_nothing_to(model: Any) -> None:
    first = "bert.encoder.layer.0.*"
    # What is left to the second are the queries of the other blocks.
    plan(model, rank_pattern={first: 2, "query": 4}, alpha_pattern={"query": 4.0, "value": 2.0})
    with pytest.raises(UserError) as caught:
        plan(
            model,
            rank_pattern={"query": 4, "*.layer.0.*": 2, "bert.*.query": 8},
            alpha_pattern={"self.value": 1.0, "query": 2.0, first: 4.0},
        )
    said = [(p.id, p.key, p.message.partition(" is one of ")[2]) for p in caught.value.problems]
    end = " as well, and the first entry counts."
    assert said == [
        ("lora.shadowed-pattern", "lora.rank_pattern", '"query", "*.layer.0.*"' + end),
        ("lora.shadowed-pattern", "lora.alpha_pattern", '"self.value", "query"' + end),
    ]
    assert caught.value.problems[0].fix == 'put "bert.*.query" first, or leave it out'


def test_tokens_and_targets_must_not_train_the_same_rows(model: Any) -> None:
    with pytest.raises(UserError) as caught:
        plan(model, targets=("word_embeddings",), trainable_tokens=("x",))
    assert [problem.key for problem in caught.value.problems] == ["lora.trainable_tokens"]


def test_a_model_without_weights_is_reported_alone(model: Any) -> None:
    with pytest.raises(UserError) as caught:
        plan_adapter(
            model,
            LoraConfig(targets=("zz",)),
            new_keys=[name for name, _ in model.named_parameters()],
            auto=None,
            source="x",
        )
    assert [problem.id for problem in caught.value.problems] == ["model.no-weights"]


@pytest.fixture
def experts() -> Any:
    config = AutoConfig.for_model(
        "mixtral",
        hidden_size=16,
        intermediate_size=8,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=2,
    )
    with torch.device("meta"):
        return MixtralModel(config)


def test_fused_weights_alone(experts: Any) -> None:
    found = plan(experts, targets=(), target_parameters=("experts.down_proj",))
    assert found.targets == ResolvedTargets((), {})
    assert found.parameters == tuple(f"layers.{i}.mlp.experts.down_proj" for i in range(3))
    assert found.short_parameters == ("experts.down_proj",)


def test_fused_weights_of_some_blocks_keep_their_whole_names(experts: Any) -> None:
    found = plan(
        experts,
        targets=("q_proj",),
        target_parameters=("down_proj",),
        layers=("top-2",),
        rank_pattern={"down_proj": 2},
    )
    names = tuple(f"layers.{i}.mlp.experts.down_proj" for i in (1, 2))
    assert found.parameters == found.short_parameters == names
    assert found.targets.names == tuple(f"layers.{i}.self_attn.q_proj" for i in (1, 2))
    with pytest.raises(UserError) as caught:
        plan(experts, targets=(), target_parameters=("down_proj",), layers=(3,))
    assert [problem.key for problem in caught.value.problems] == ["lora.layers"]


def test_nothing_is_left_out_where_no_layer_is_meant(experts: Any) -> None:
    with pytest.raises(UserError) as caught:
        plan(experts, targets=(), target_parameters=("down_proj",), exclude=("nonsense",))
    assert [problem.key for problem in caught.value.problems] == ["lora.exclude"]


def test_blocks_without_experts_are_reported() -> None:
    config = AutoConfig.for_model(
        "qwen3_moe",
        hidden_size=16,
        moe_intermediate_size=8,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_experts=2,
        mlp_only_layers=[0],
    )
    with torch.device("meta"):
        mixed = AutoModel.from_config(config)
    found = plan(mixed, targets=("q_proj",), target_parameters=("experts.down_proj",))
    assert found.parameters == ("layers.1.mlp.experts.down_proj",)
    with pytest.raises(UserError) as caught:
        plan(mixed, targets=("q_proj",), target_parameters=("experts.down_proj",), layers=(0,))
    assert [problem.key for problem in caught.value.problems] == ["lora.layers"]


def test_a_bias_in_b_needs_a_bias_to_be_merged_into(experts: Any, model: Any) -> None:
    assert plan(model, lora_bias=True).targets.names
    with pytest.raises(UserError) as caught:
        plan(experts, targets=("q_proj",), lora_bias=True)
    (problem,) = caught.value.problems
    assert problem.key == "lora.lora_bias"
    assert problem.message.endswith("these have none: q_proj.")


def test_putting_in_everything() -> None:
    model = BertForSequenceClassification(CONFIG)
    found = plan(model, rank_pattern={"query": 4}, modules_to_save=("pooler",), layers=(-1,))
    path = "bert.embeddings.word_embeddings"
    settings = LoraSettings(r=2, alpha=4.0, rank_pattern={"query": 4}, bias="lora_only")
    put_adapter(model, found, settings, tokens={path: (3, 5)})
    assert isinstance(model.bert.embeddings.word_embeddings, TokenEmbedding)
    shapes = {name: tuple(value.shape) for name, value in adapter_state(model, found.saved).items()}
    query, value = SELF.format(2, "query"), SELF.format(2, "value")
    assert shapes == {
        f"{path}.token_adapter.trainable_tokens_delta": (2, 8),
        f"{query}.base_layer.bias": (8,),
        f"{query}.lora_A.weight": (4, 8),
        f"{query}.lora_B.weight": (8, 4),
        f"{value}.base_layer.bias": (8,),
        f"{value}.lora_A.weight": (2, 8),
        f"{value}.lora_B.weight": (8, 2),
        "bert.pooler.dense.weight": (8, 8),
        "bert.pooler.dense.bias": (8,),
        "classifier.weight": (2, 8),
        "classifier.bias": (2,),
    }

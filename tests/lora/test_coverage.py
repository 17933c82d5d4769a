import copy
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoConfig, BertConfig, BertForSequenceClassification

from lora_cli.config.adapters import LoraConfig
from lora_cli.lora.coverage import (
    LayerGroup,
    cost_of,
    count_parameters,
    describe_plan,
    list_layers,
)
from lora_cli.lora.initial import start_adapters
from lora_cli.lora.planning import AdapterPlan, plan_adapter, put_adapter
from lora_cli.lora.portable import to_portable
from lora_cli.lora.settings import AdaLoraSettings, LoraSettings
from lora_cli.lora.state import adapter_state

CONFIG = BertConfig(
    vocab_size=20, hidden_size=8, num_hidden_layers=3, num_attention_heads=2, intermediate_size=16
)
NEW = ("classifier.weight", "classifier.bias")
ADALORA = AdaLoraSettings(init_r=3, total_steps=10)


def plan(model: Any, **settings: Any) -> AdapterPlan:
    return plan_adapter(
        model, LoraConfig(**settings), new_keys=NEW, auto=("query", "value"), source="x"
    )


def row(group: LayerGroup) -> tuple[str, str, str, int, str]:
    return group.name, group.kind, group.size, len(group.names), group.blocks


def test_layers_of_bert() -> None:
    model = BertForSequenceClassification(CONFIG)
    assert [row(group) for group in list_layers(model)] == [
        ("word_embeddings", "embedding", "20 x 8", 1, ""),
        ("position_embeddings", "embedding", "512 x 8", 1, ""),
        ("token_type_embeddings", "embedding", "2 x 8", 1, ""),
        ("query", "linear", "8 -> 8", 3, "0-2"),
        ("key", "linear", "8 -> 8", 3, "0-2"),
        ("value", "linear", "8 -> 8", 3, "0-2"),
        ("dense", "linear", "8 -> 8", 4, "0-2, outside"),
        ("dense", "linear", "8 -> 16", 3, "0-2"),
        ("dense", "linear", "16 -> 8", 3, "0-2"),
        ("classifier", "linear", "8 -> 2", 1, ""),
    ]
    for group in list_layers(model):
        for name in group.names:
            assert tuple(model.get_submodule(name).weight.shape) == group.shape


@pytest.mark.parametrize(
    ("model_type", "settings", "expected"),
    [
        ("gpt2", {"n_embd": 12}, ("c_attn", "conv1d", "12 -> 36", 12, "0-11")),
        ("vit", {"hidden_size": 12}, ("projection", "conv", "3 -> 12, 16x16", 1, "")),
        (
            "wav2vec2",
            {"conv_dim": (8, 8), "conv_stride": (5, 2), "conv_kernel": (10, 3)},
            ("conv", "conv", "8 -> 8, 3", 1, "1"),
        ),
        ("bridgetower", {}, ("attn", "attention", "768 -> 768", 12, "0-11")),
        (
            "mixtral",
            {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 16},
            ("experts.down_proj", "parameter", "8 x 64 x 16", 2, "0-1"),
        ),
    ],
)
def test_layers_of_other_kinds(
    model_type: str, settings: dict[str, Any], expected: tuple[str, str, str, int, str]
) -> None:
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(AutoConfig.for_model(model_type, **settings))
    assert expected in [row(group) for group in list_layers(model)]


SETTINGS = {
    "plain": LoraSettings(r=2, alpha=4.0),
    "rslora": LoraSettings(r=2, alpha=4.0, rslora=True),
    "bias": LoraSettings(r=2, alpha=4.0, lora_bias=True, bias="all"),
    "patterns": LoraSettings(r=2, alpha=4.0, rank_pattern={"query": 5}),
    "pissa": LoraSettings(r=2, alpha=4.0, init="pissa"),
    "olora": LoraSettings(r=2, alpha=4.0, init="olora"),
    "dora": LoraSettings(r=2, alpha=4.0, variant="dora"),
    "lora_fa": LoraSettings(r=2, alpha=4.0, variant="lora_fa"),
    "vera": LoraSettings(r=2, alpha=4.0, variant="vera"),
    "adalora": LoraSettings(r=2, alpha=4.0, variant="adalora", adalora=ADALORA),
}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("tokens", [{}, {"bert.embeddings.word_embeddings": (3, 4)}])
def test_costs_are_those_of_a_model_with_numbers(
    name: str, tokens: dict[str, tuple[int, ...]]
) -> None:
    settings = SETTINGS[name]
    with torch.device("meta"):
        empty = BertForSequenceClassification(CONFIG)
    before = {name: id(module) for name, module in empty.named_modules()}
    found = plan(empty, modules_to_save=("pooler",))
    cost = cost_of(empty, found, settings, tokens=tokens)
    assert {name: id(module) for name, module in empty.named_modules()} == before

    model = BertForSequenceClassification(CONFIG)
    put_adapter(model, found, settings, tokens=tokens)
    start_adapters(model, settings)
    total, trained = count_parameters(model)
    assert (cost.total, cost.trained) == (total, trained)
    assert cost.share == pytest.approx(trained / total)
    state, _ = to_portable(adapter_state(model, found.saved), settings)
    assert {name: (value.shape, value.dtype) for name, value in cost.tensors.items()} == {
        name: (value.shape, value.dtype) for name, value in state.items()
    }


def test_count_of_parameters_takes_tied_ones_once() -> None:
    first, second = nn.Linear(3, 2), nn.Linear(3, 2, bias=False)
    second.weight = first.weight
    first.bias.requires_grad_(False)
    assert count_parameters(nn.Sequential(first, second)) == (8, 6)
    assert count_parameters(copy.deepcopy(first)) == (8, 6)


def test_description_is_a_few_lines() -> None:
    model = BertForSequenceClassification(CONFIG)
    found = plan(model, targets=("query", "pooler.dense"), layers=None)
    tokens = {"bert.embeddings.word_embeddings": (3, 4)}
    assert describe_plan(found, tokens, note=" (perhaps)") == [
        "adapters: query: 3 layers (0-2), pooler.dense: 1 layer",
        "trained whole: classifier (perhaps)",
        "trained tokens: 2 rows of bert.embeddings.word_embeddings",
    ]
    assert describe_plan(found, {})[1:] == ["trained whole: classifier"]


def test_description_names_fused_weights() -> None:
    with torch.device("meta"):
        model = transformers.MixtralModel(AutoConfig.for_model("mixtral", num_hidden_layers=3))
    found = plan_adapter(
        model,
        LoraConfig(targets=(), target_parameters=("*experts.*",), layers=("1-2",)),
        new_keys=(),
        auto=None,
        source="x",
    )
    assert describe_plan(found, {}) == [
        "adapters: experts.gate_up_proj: 2 layers (1-2), experts.down_proj: 2 layers (1-2)",
        "trained whole: nothing",
    ]

"""What each strategy trains, on models whose parameters are told apart by name."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForSequenceClassification,
    T5Config,
    T5ForSequenceClassification,
)

from lora_cli.config.commands import VARIANTS
from lora_cli.config.strategies import (
    AdapterStrategyConfig,
    BitFitStrategyConfig,
    FullStrategyConfig,
    HeadStrategyConfig,
    LoraThenFullStrategyConfig,
    PrefixStrategyConfig,
    StrategyConfig,
    TopStrategyConfig,
)
from lora_cli.errors import UserError
from lora_cli.lora.prefix import STATE
from lora_cli.lora.state import adapter_state, load_adapter_state
from lora_cli.lora.strategies import (
    WITH_LORA,
    Applied,
    apply_strategy,
    check_mergeable,
    dtypes_of,
    head_modules,
    own_frozen,
    round_to,
    train_all,
    why_unmergeable,
)

IDS = torch.tensor([[2, 5, 7, 9], [2, 6, 4, 1]])
NEW = ("classifier",)
ALL: list[Any] = [
    FullStrategyConfig(),
    HeadStrategyConfig(),
    TopStrategyConfig(layers=2),
    BitFitStrategyConfig(),
    LoraThenFullStrategyConfig(),
    AdapterStrategyConfig(size=3, placement="houlsby"),
    PrefixStrategyConfig(num_tokens=4),
]


def bert(dtype: torch.dtype = torch.float32) -> BertForSequenceClassification:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=20,
        hidden_size=8,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=8,
        num_labels=3,
        initializer_range=0.3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertForSequenceClassification(config).to(dtype).eval()


def trained(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def expected_names(strategy: StrategyConfig) -> set[str]:
    """The parameters that each strategy trains, from the names in a fresh BERT."""
    names = {name for name, _ in bert().named_parameters()}
    head = {"classifier.weight", "classifier.bias"}
    match strategy:
        case TopStrategyConfig():
            return {n for n in names if ".layer.1." in n or ".layer.2." in n} | head
        case BitFitStrategyConfig():
            return {n for n in names if n.endswith(".bias")} | head
        case AdapterStrategyConfig():
            ends = ("attention.output.dense", "output.dense")
            leaves = ("down.weight", "down.bias", "up.weight", "up.bias")
            stem = "bert.encoder.layer"
            return {f"{stem}.{i}.{e}.{f}" for i in range(3) for e in ends for f in leaves} | head
        case PrefixStrategyConfig():
            return {STATE} | head
        case HeadStrategyConfig():
            return head
    return names


def step(model: nn.Module) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(IDS).logits.float().square().sum().backward()
    optimizer.step()


def test_there_is_one_for_each_choice_of_the_setting() -> None:
    names = {strategy.name for strategy in ALL} | set(WITH_LORA)
    assert names == set(VARIANTS["strategy"][1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("strategy", ALL, ids=lambda strategy: strategy.name)
def test_it_trains_what_it_says_and_saves_what_it_trains(
    strategy: StrategyConfig, dtype: torch.dtype
) -> None:
    model, base = bert(dtype), bert(dtype)
    logits = base(IDS).logits
    applied = apply_strategy(model, strategy, NEW, seed=1)
    expected = expected_names(strategy)
    assert trained(model) == expected
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    assert set(adapter_state(model, applied.saved)) == expected
    if strategy.name != "prefix":
        # Only rounding lies between a model in bfloat16 and parts of it in float32.
        rounding = 0.0 if dtype == torch.float32 else 0.1
        assert (model(IDS).logits.float() - logits.float()).abs().max() <= rounding
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    step(model)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    # The keys of an attention have a bias that softmax takes out; zero factors wait for a step.
    idle = {n for n in expected if n.endswith(("key.bias", "down.weight", "down.bias"))}
    assert expected - idle <= moved <= expected
    assert applied.text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("strategy", ALL, ids=lambda strategy: strategy.name)
def test_the_state_makes_the_model_again(strategy: StrategyConfig, dtype: torch.dtype) -> None:
    model = bert(dtype)
    applied = apply_strategy(model, strategy, NEW, seed=1)
    step(model)
    state = adapter_state(model, applied.saved)
    other = bert(dtype)
    with torch.no_grad():
        other.classifier.weight.normal_()
    # Another seed: nothing of the start may be left.
    again = apply_strategy(other, strategy, NEW, seed=2)
    assert again == applied
    load_adapter_state(other, state, again.saved)
    assert torch.equal(other(IDS).logits, model(IDS).logits)
    name = sorted(state)[0]
    with pytest.raises(UserError, match="lacks"):
        load_adapter_state(other, {k: v for k, v in state.items() if k != name}, again.saved)


@pytest.mark.parametrize("strategy", [FullStrategyConfig(), BitFitStrategyConfig()])
def test_a_model_in_float32_is_rounded_once_to_the_dtypes_of_the_base(
    strategy: StrategyConfig,
) -> None:
    model = bert(torch.bfloat16)
    model.bert.embeddings.LayerNorm.float()
    dtypes = dtypes_of(model)
    frozen = {n: p.clone() for n, p in model.named_parameters()}
    apply_strategy(model, strategy, NEW, seed=0)
    step(model)
    fine = {name: value.detach().clone() for name, value in model.named_parameters()}
    names = trained(model)
    round_to(model, dtypes)
    for name, value in model.named_parameters():
        assert value.dtype == dtypes[name]
        assert torch.equal(value, fine[name].to(dtypes[name]))
        if name not in names:
            assert torch.equal(value, frozen[name])


def test_blocks_trained_in_a_coarse_base_are_rounded_in_value() -> None:
    model = bert(torch.bfloat16)
    dtypes = dtypes_of(model)
    apply_strategy(model, TopStrategyConfig(layers=1), NEW, seed=0)
    step(model)
    weight = model.bert.encoder.layer[2].output.dense.weight
    fine = weight.detach().clone()
    round_to(model, dtypes)
    assert torch.equal(weight, fine.bfloat16().float())
    assert not torch.equal(weight, fine)
    assert model(IDS).logits.isfinite().all()


def test_top_takes_the_last_blocks_of_the_decoder_and_no_more_than_there_are() -> None:
    config = T5Config(
        vocab_size=20,
        d_model=8,
        d_kv=4,
        d_ff=8,
        num_layers=2,
        num_decoder_layers=3,
        num_heads=2,
        num_labels=2,
    )
    model = T5ForSequenceClassification(config)
    applied = apply_strategy(model, TopStrategyConfig(layers=2), (), seed=0)
    assert applied.saved == (
        "transformer.decoder.block.1",
        "transformer.decoder.block.2",
        "classification_head",
    )
    with pytest.raises(UserError) as caught:
        apply_strategy(bert(), TopStrategyConfig(layers=4), NEW, seed=0)
    problem = caught.value.problems[0]
    assert (problem.id, problem.key, problem.allowed) == (
        "strategy.layers",
        "strategy.layers",
        "1 to 3",
    )


def test_a_model_without_biases_has_none_to_train() -> None:
    config = LlamaConfig(
        vocab_size=20,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        num_labels=2,
    )
    model = LlamaForSequenceClassification(config)
    with pytest.raises(UserError, match="the layers of llama have none"):
        apply_strategy(model, BitFitStrategyConfig(), ("score",), seed=0)


def test_the_head_is_what_is_new_and_what_is_outside_of_the_backbone() -> None:
    model = bert()
    assert head_modules(model, ()) == ("classifier",)
    assert head_modules(model, ("classifier", "bert.pooler")) == ("bert.pooler", "classifier")
    language = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2))
    assert head_modules(language, ()) == ()
    with pytest.raises(UserError, match="the model has none"):
        apply_strategy(language, HeadStrategyConfig(), (), seed=0)


def test_what_a_model_never_trains_stays_frozen_in_full() -> None:
    model = bert()
    model.bert.embeddings.position_embeddings.weight.requires_grad_(False)
    name = "bert.embeddings.position_embeddings.weight"
    assert own_frozen(model) == {name}
    apply_strategy(model, FullStrategyConfig(), NEW, seed=0)
    assert name not in trained(model)
    assert len(trained(model)) == len(list(model.parameters())) - 1
    other = bert(torch.bfloat16)
    other.requires_grad_(False)
    train_all(other, {name})
    assert trained(other) == trained(model)
    assert {value.dtype for value in other.parameters()} == {torch.float32}


class Linear4bit(nn.Linear):
    """Stands for the layer of bitsandbytes, which is told by its name."""


Linear4bit.__module__ = "bitsandbytes.nn"


@pytest.mark.parametrize(
    "strategy", [FullStrategyConfig(), TopStrategyConfig(), BitFitStrategyConfig()]
)
def test_quantized_weights_are_not_trained(strategy: StrategyConfig) -> None:
    model = bert()
    model.bert.encoder.layer[0].output.dense = Linear4bit(8, 8)
    with pytest.raises(UserError, match="they are quantized"):
        apply_strategy(model, strategy, NEW, seed=0)
    assert trained(model) == {name for name, _ in model.named_parameters()}


def test_the_seed_decides_the_start_and_the_random_state_is_kept() -> None:
    before = torch.random.get_rng_state()
    for strategy in (AdapterStrategyConfig(size=3), PrefixStrategyConfig(num_tokens=3)):
        states = []
        for seed in (1, 1, 2):
            model = bert()
            torch.random.set_rng_state(before)
            applied = apply_strategy(model, strategy, NEW, seed=seed)
            states.append(adapter_state(model, applied.saved))
        one, same, other = states
        assert all(torch.equal(one[name], same[name]) for name in one)
        assert any(not torch.equal(one[name], other[name]) for name in one)
        assert torch.equal(torch.random.get_rng_state(), before)


def test_only_what_can_be_part_of_the_weights_is_merged() -> None:
    refused = {strategy.name for strategy in ALL if why_unmergeable(strategy.name)}
    assert refused == {"adapter", "prefix"}
    check_mergeable("top", key="from", fix="")
    with pytest.raises(UserError) as caught:
        check_mergeable("prefix", key="from", fix="lora-cli predict runs/a")
    problem = caught.value.problems[0]
    assert (problem.id, problem.key, problem.fix) == (
        "merge.impossible",
        "from",
        "lora-cli predict runs/a",
    )
    assert "strategy=prefix cannot" in problem.message


def test_nothing_is_shared_between_models() -> None:
    model = bert()
    other = copy.deepcopy(model)
    assert isinstance(apply_strategy(model, FullStrategyConfig(), NEW, seed=0), Applied)
    step(model)
    assert torch.equal(other(IDS).logits, bert()(IDS).logits)

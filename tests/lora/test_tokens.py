import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from torch import nn
from transformers import AutoConfig, BertTokenizer

from lora_cli.errors import UserError
from lora_cli.lora.inject import freeze_base, inject_lora, trainable_parameters
from lora_cli.lora.merge import merge_lora
from lora_cli.lora.settings import LoraSettings
from lora_cli.lora.state import adapter_state, load_adapter_state
from lora_cli.lora.targets import match_targets
from lora_cli.lora.tokens import (
    TiedTokens,
    TokenEmbedding,
    add_tokens,
    check_tokens,
    input_tokens,
    make_room,
    prepare_tokens,
    put_tokens,
)

IDS = (7, 3, 30)
PREFIX = "base_model.model."
LEAF = "token_adapter.trainable_tokens_delta"
INPUTS = torch.tensor([[7, 3, 4, 30, 5, 7, 2], [1, 4, 30, 3, 3, 8, 2]])
BERT = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "initializer_range": 0.3,
}
BART = {
    "vocab_size": 40,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "scale_embedding": True,
    "init_std": 0.3,
}
T5 = {
    "vocab_size": 40,
    "d_model": 16,
    "num_layers": 2,
    "d_ff": 16,
    "num_heads": 2,
    "d_kv": 8,
    "decoder_start_token_id": 0,
}
GPT2 = {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 2, "bos_token_id": 1}
LLAMA = {**BERT, "num_key_value_heads": 2}

# Class, family, configuration, targets, and how many layers follow the embedding.
CASES = {
    "encoder": ("AutoModelForSequenceClassification", "bert", BERT, "query", 0),
    "output": ("AutoModelForMaskedLM", "bert", BERT, "query", 1),
    "decoder": ("AutoModelForCausalLM", "gpt2", GPT2, "c_attn", 1),
    "untied": ("AutoModelForCausalLM", "llama", LLAMA, "q_proj", 0),
    "scaled": ("AutoModelForCausalLM", "gemma3_text", {**LLAMA, "head_dim": 8}, "q_proj", 1),
    "two-stacks": ("AutoModelForSeq2SeqLM", "t5", T5, "q", 3),
    "scaled-stacks": ("AutoModelForSeq2SeqLM", "bart", BART, "q_proj", 3),
    "stacks-with-head": ("AutoModelForSequenceClassification", "bart", BART, "q_proj", 2),
}


def build(case: str) -> tuple[Any, dict[str, torch.Tensor], tuple[str, ...], int]:
    auto_class, family, settings, target, followers = CASES[case]
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, eos_token_id=2, **settings)
    model = getattr(transformers, auto_class).from_config(config).eval()
    inputs = {"input_ids": INPUTS}
    if "Seq2Seq" in auto_class:
        inputs["decoder_input_ids"] = INPUTS[:, :5]
    return model, inputs, (target,), followers


def adapt(model: Any, targets: tuple[str, ...]) -> None:
    names = match_targets(model, targets=targets, saved_modules=())
    inject_lora(model, names, LoraSettings(r=2, alpha=4.0))
    put_tokens(model, input_tokens(model, IDS))
    freeze_base(model, ())


@pytest.mark.filterwarnings("ignore")  # of PEFT, about transformers and Conv1D
@pytest.mark.parametrize("case", [case for case in CASES if case != "stacks-with-head"])
def test_as_peft_computes(case: str) -> None:
    base, inputs, targets, followers = build(case)
    ours, theirs = base, copy.deepcopy(base)
    adapt(ours, targets)
    config = peft.LoraConfig(
        r=2,
        lora_alpha=4,
        target_modules=list(targets),
        trainable_token_indices=list(IDS),
        init_lora_weights=False,
    )
    wrapped = peft.get_peft_model(theirs, config).eval()
    torch.manual_seed(1)
    state = {
        name: torch.randn_like(value) / 4
        for name, value in peft.get_peft_model_state_dict(wrapped).items()
    }
    peft.set_peft_model_state_dict(wrapped, state)
    mine = adapter_state(ours, ())
    assert {PREFIX + name: value.shape for name, value in mine.items()} == {
        name: value.shape for name, value in state.items()
    }
    load_adapter_state(ours, {n.removeprefix(PREFIX): value for n, value in state.items()}, ())
    assert sum(isinstance(module, TiedTokens) for module in ours.modules()) == followers

    logits, expected = ours(**inputs).logits, wrapped(**inputs).logits
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    weights = torch.randn_like(logits)
    (logits * weights).sum().backward()
    (expected * weights).sum().backward()
    trained = trainable_parameters(ours)
    gradients = {
        name.removeprefix(PREFIX).replace(".default", ""): parameter.grad
        for name, parameter in wrapped.named_parameters()
        if parameter.grad is not None
    }
    assert gradients.keys() == trained.keys()
    for name, parameter in trained.items():
        torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-5, rtol=1e-4)

    merge_lora(ours)
    merged = wrapped.merge_and_unload()
    theirs_by_name = dict(merged.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter, theirs_by_name[name], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(ours(**inputs).logits, logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_rows_count_wherever_the_table_is_used(case: str) -> None:
    # PEFT 0.21 forgets the embeddings of encoder and decoder where a model with a head ties them.
    ours, inputs, _, _ = build(case)
    plain = copy.deepcopy(ours)
    put_tokens(ours, input_tokens(ours, IDS))
    rows = torch.randn(len(IDS), 16) / 4
    with torch.no_grad():
        ours.get_input_embeddings().rows.copy_(rows)
        plain.get_input_embeddings().weight[list(IDS)] = rows
    expected = plain(**inputs).logits
    torch.testing.assert_close(ours(**inputs).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", ["output", "decoder", "two-stacks", "stacks-with-head"])
def test_tied_weights_stay_tied_after_merging(case: str) -> None:
    model, _, targets, followers = build(case)
    before = {name: p.shape for name, p in model.named_parameters(remove_duplicate=False)}
    adapt(model, targets)
    merge_lora(model)
    after = {name: p.shape for name, p in model.named_parameters(remove_duplicate=False)}
    assert after == before
    table = model.get_input_embeddings().weight
    owners = [name for name, p in model.named_parameters(remove_duplicate=False) if p is table]
    assert len(owners) == followers + 1


def test_output_bias_stays() -> None:
    # PEFT leaves it out of the logits of tied layers.
    model, inputs, targets, _ = build("output")
    with torch.no_grad():
        model.cls.predictions.bias.normal_()
    expected = model(**inputs).logits
    adapt(model, targets)
    torch.testing.assert_close(model(**inputs).logits, expected)


def test_against_plain_algebra() -> None:
    draw = np.random.default_rng(0)
    table, rows = draw.normal(size=(10, 4)), draw.normal(size=(2, 4))
    ids, upstream = np.array([[1, 7, 2], [7, 7, 0]]), draw.normal(size=(2, 3, 4))
    layer = TokenEmbedding(nn.Embedding(10, 4, _weight=torch.tensor(table)), [7, 2])
    layer.rows.data = torch.tensor(rows)
    result = layer(torch.tensor(ids))
    (result * torch.tensor(upstream)).sum().backward()
    whole = table.copy()
    whole[[7, 2]] = rows
    gradient = np.stack([upstream[ids == number].sum(axis=0) for number in (7, 2)])
    np.testing.assert_array_equal(result.detach().numpy(), whole[ids])
    np.testing.assert_allclose(layer.rows.grad, gradient)
    np.testing.assert_array_equal(layer.weight.detach().numpy(), whole)
    np.testing.assert_array_equal(layer.merged().weight.numpy(), whole)
    np.testing.assert_allclose(layer.delta_weight().numpy(), whole - table, atol=1e-6)
    np.testing.assert_array_equal(layer.base_layer.weight.numpy(), table)


def test_rows_are_float32_on_a_coarser_base_and_rounded_once() -> None:
    base = nn.Embedding(10, 4, dtype=torch.bfloat16)
    layer = TokenEmbedding(base, [7, 2])
    assert layer.rows.dtype == torch.float32
    with torch.no_grad():
        layer.rows.normal_()
    ids = torch.tensor([7, 1, 2])
    assert layer(ids).dtype == torch.bfloat16
    merged = layer.merged()
    assert merged.weight.dtype == torch.bfloat16
    assert torch.equal(merged.weight[[7, 2]], layer.rows.bfloat16())
    assert torch.equal(merged(ids), layer(ids))


def test_only_the_rows_are_trained() -> None:
    model, inputs, targets, _ = build("decoder")
    adapt(model, targets)
    trained = trainable_parameters(model)
    assert f"transformer.wte.{LEAF}" in trained
    before = {name: p.clone() for name, p in model.named_parameters() if name not in trained}
    optimizer = torch.optim.SGD(trained.values(), lr=1.0)
    model(**inputs).logits.square().mean().backward()
    optimizer.step()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)


@pytest.mark.parametrize("indices", [[1, 1], [10], [-1]])
def test_numbers_must_be_different_rows(indices: list[int]) -> None:
    with pytest.raises(ValueError, match="different rows of 10"):
        TokenEmbedding(nn.Embedding(10, 4), indices)


def test_an_embedding_that_does_more_is_refused() -> None:
    with pytest.raises(ValueError, match="max_norm"):
        TokenEmbedding(nn.Embedding(10, 4, max_norm=1.0), [1])


@pytest.fixture
def tokenizer(tiny_model_dir: Callable[..., Path]) -> BertTokenizer:
    return BertTokenizer.from_pretrained(tiny_model_dir())


def test_texts_are_added_where_they_are_new(tokenizer: BertTokenizer) -> None:
    size = len(tokenizer)
    good = tokenizer.convert_tokens_to_ids("good")
    assert add_tokens(tokenizer, ("<ticker>", "good", "<eps>")) == (size, good, size + 1)
    assert tokenizer("the <ticker> is good", add_special_tokens=False)["input_ids"] == [
        tokenizer.convert_tokens_to_ids("the"),
        size,
        tokenizer.convert_tokens_to_ids("is"),
        good,
    ]
    assert add_tokens(tokenizer, ("<ticker>",)) == (size,)
    assert len(tokenizer) == size + 2
    assert add_tokens(tokenizer, ()) == ()


@pytest.mark.parametrize("texts", [("a", "a"), ("",), ("  ",)])
def test_texts_that_cannot_be_tokens(tokenizer: BertTokenizer, texts: tuple[str, ...]) -> None:
    size = len(tokenizer)
    with pytest.raises(UserError) as caught:
        add_tokens(tokenizer, texts)
    assert {problem.key for problem in caught.value.problems} == {"lora.trainable_tokens"}
    assert len(tokenizer) == size


@pytest.mark.parametrize("case", ["encoder", "decoder", "two-stacks"])
def test_room_is_made_once_and_follows_the_seed(case: str) -> None:
    model, _, _, followers = build(case)
    old = model.get_input_embeddings().weight.detach().clone()
    twin = copy.deepcopy(model)
    state = torch.random.get_rng_state()
    make_room(model, (40, 41), seed=5)
    assert torch.equal(torch.random.get_rng_state(), state)
    make_room(twin, (40, 41), seed=5)
    new = model.get_input_embeddings().weight
    assert new.shape[0] == 42
    assert torch.equal(new[:40], old)
    assert torch.equal(new, twin.get_input_embeddings().weight)
    torch.testing.assert_close(new[40], old.mean(dim=0), atol=1e-2, rtol=0)
    owners = [name for name, p in model.named_parameters(remove_duplicate=False) if p is new]
    assert len(owners) == followers + 1
    make_room(model, (3, 41), seed=6)
    assert model.get_input_embeddings().weight is new


def test_room_that_is_there_is_used(tokenizer: BertTokenizer) -> None:
    config = AutoConfig.for_model("bert", **{**BERT, "vocab_size": len(tokenizer) + 8})
    model = transformers.BertModel(config)
    table = model.get_input_embeddings().weight
    size = len(tokenizer)
    assert prepare_tokens(model, tokenizer, ("<eps>",), seed=0) == {
        "embeddings.word_embeddings": (size,)
    }
    assert model.get_input_embeddings().weight is table
    assert table.shape[0] == size + 8


def test_room_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = transformers.BertModel(AutoConfig.for_model("bert", **BERT))
    make_room(model, (40,), seed=0)
    put_tokens(model, input_tokens(model, (40,)))
    assert model.embeddings.word_embeddings.rows.shape == (1, 16)


def test_what_trains_the_same_rows_is_refused() -> None:
    model, _, _, _ = build("decoder")
    assert check_tokens(model, (), ()) == []
    assert "in `lora.targets`" in check_tokens(model, ("transformer.wte",), ())[0].message
    assert "trained whole" in check_tokens(model, (), ("lm_head",))[0].message
    vision = transformers.ViTModel(AutoConfig.for_model("vit", hidden_size=12, num_hidden_layers=1))
    assert "has none" in check_tokens(vision, (), ())[0].message


def test_an_embedding_with_two_paths_is_replaced_on_both() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Embedding(10, 4)
            self.second = self.first

        def get_input_embeddings(self) -> nn.Module:
            return self.first

    model = Shared()
    put_tokens(model, {"first": (1,)})
    assert isinstance(model.first, TokenEmbedding)
    assert model.second is model.first
    merge_lora(model)
    assert type(model.first) is nn.Embedding
    assert model.second is model.first

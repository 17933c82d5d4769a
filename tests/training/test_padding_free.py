"""Training without padding, against the same model on padded rows."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from lora_cli.lora.inject import freeze_base, inject_lora
from lora_cli.lora.settings import LoraSettings
from lora_cli.training.padding_free import PaddingFree, active_layout, why_padded

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 3,
    "cls_token_id": 2,
    "sep_token_id": 3,
}
DISTILBERT = {"vocab_size": 61, "dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64}
MODELS = {
    "bert": "SequenceClassification",
    "bert-tokens": "TokenClassification",
    "bert-answers": "QuestionAnswering",
    "roberta": "SequenceClassification",
    "distilbert": "SequenceClassification",
    "electra": "TokenClassification",
    "modernbert": "SequenceClassification",
    "llama": "CausalLM",
    "qwen3": "CausalLM",
    "mistral": "CausalLM",
    "gemma3_text": "CausalLM",
    "gpt2": "CausalLM",
}


def build(name: str) -> Any:
    kind, head = name.partition("-")[0], MODELS[name]
    sizes = DISTILBERT if kind == "distilbert" else SIZES
    # Sliding windows are shorter than the texts here.
    more = {"sliding_window": 4} if kind in ("mistral", "gemma3_text") else {}
    more |= {"local_attention": 4} if kind == "modernbert" else {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(kind, **sizes, **more)
        model: Any = getattr(transformers, f"AutoModelFor{head}").from_config(config)
    return without_dropout(model)


def without_dropout(model: Any) -> Any:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0
    return model.train()


def batch() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    ids, mask = torch.randint(4, 60, (5, 13), generator=draw), torch.ones(5, 13, dtype=torch.long)
    for row, length in enumerate((5, 13, 3, 9, 12)):
        ids[row, length:], mask[row, length:] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def run(model: Any, given: dict[str, torch.Tensor]) -> tuple[list[torch.Tensor], dict[str, Any]]:
    """Return what a model says at real tokens, and the gradients of a mean of it."""
    model.zero_grad()
    output = model(**given)
    parts = [x for x in (output.get("logits"), output.get("start_logits")) if x is not None]
    shape = given["attention_mask"].shape
    real = [x[given["attention_mask"].bool()] if x.shape[:2] == shape else x for x in parts]
    loss = sum((x.sin() * torch.linspace(-1, 1, x.numel()).view_as(x)).mean() for x in real)
    assert isinstance(loss, torch.Tensor)
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return [x.detach() for x in real], gradients


def assert_same(model: Any, given: dict[str, torch.Tensor]) -> None:
    """Compare to 1e-6 in float32, and closely enough in float64 that no error can hide in it."""
    free = PaddingFree(model)
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.float64, 1e-9)):
        model.to(dtype)
        model.base_model.training = False
        said, gradients = run(model, given)
        model.base_model.training, before = True, free.batches
        said_free, gradients_free = run(model, given)
        assert free.batches > before
        for one, other in zip(said, said_free, strict=True):
            torch.testing.assert_close(one, other, rtol=10 * tolerance, atol=10 * tolerance)
        assert gradients.keys() == gradients_free.keys()
        for name, one in gradients.items():
            assert float((one - gradients_free[name]).abs().max()) <= tolerance, name
    assert active_layout() is None
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("name", MODELS)
def test_gradients_of_every_weight_are_those_of_padded_rows(name: str) -> None:
    model = build(name)
    assert why_padded(model) is None
    assert_same(model, batch())


@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_adapters(name: str, variant: Any) -> None:
    model = build(name)
    ends = ("query", "value", "q_proj", "v_proj", "dense", "down_proj")
    names = [n for n, _ in model.named_modules() if n.endswith(ends) and ".pooler" not in n]
    inject_lora(model, names, LoraSettings(r=2, alpha=4.0, variant=variant))
    freeze_base(model, ())
    for parameter in model.parameters():
        if parameter.requires_grad and not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    assert_same(model, batch())


def test_no_layer_of_a_block_sees_padding() -> None:
    model, given = build("llama"), batch()
    seen = []
    block = model.model.layers[1]
    for layer in (block.mlp.up_proj, block.self_attn.q_proj, block.input_layernorm):
        layer.register_forward_hook(lambda _m, _i, output: seen.append(output.shape[:2]))
    PaddingFree(model)
    model(**given, use_cache=False)
    assert seen == [(1, int(given["attention_mask"].sum()))] * 3


def test_bfloat16_autocast() -> None:
    model, given = build("bert"), batch()
    with torch.autocast("cpu", torch.bfloat16):
        said, _ = run(model, given)
        free = PaddingFree(model)
        said_free, _ = run(model, given)
    assert free.batches == 1
    torch.testing.assert_close(said, said_free, rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize(
    "change",
    [
        {"attention_mask": None},
        {"attention_mask": torch.ones(5, 13, dtype=torch.long)},
        {"attention_mask": batch()["attention_mask"].flip(1)},
        {"use_cache": True},
        {"output_hidden_states": True},
    ],
)
def test_what_is_not_understood_is_run_as_ever(change: dict[str, Any]) -> None:
    model, given = build("llama"), {**batch(), **change}
    expected = model(**given)
    free = PaddingFree(model)
    found = model(**given)
    assert free.batches == 0
    assert torch.equal(found.logits, expected.logits)


def test_an_evaluation_is_run_as_ever() -> None:
    model, given = build("bert").eval(), batch()
    expected = model(**given).logits
    free = PaddingFree(model)
    assert torch.equal(model(**given).logits, expected)
    assert free.batches == 0
    with free.tried():
        model(**given)
    assert free.batches == 1


def test_a_failure_within_the_model_leaves_nothing_behind() -> None:
    model, given = build("bert"), batch()
    PaddingFree(model)

    def fail(*_: Any) -> None:
        raise RuntimeError("here")

    handle = model.bert.encoder.layer[1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="here"):
        model(**given)
    handle.remove()
    other = build("bert")
    assert active_layout() is None
    assert model.config._attn_implementation == "sdpa"
    model(**given)
    other(**given)


def test_hooks_can_be_taken_out() -> None:
    model, given = build("bert"), batch()
    free = PaddingFree(model)
    free.remove()
    model(**given)
    assert free.batches == 0
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_models_that_are_not_made_for_it_are_named(
    tiny_language_dir: Callable[..., Path],
) -> None:
    t5 = transformers.AutoModelForSeq2SeqLM.from_pretrained(tiny_language_dir("t5"))
    assert why_padded(t5) == "T5ForConditionalGeneration has 2 stacks of blocks"
    assert why_padded(without_blocks()) == "Bare has no stacks of blocks"
    eager = build("bert")
    eager.set_attn_implementation("eager")
    reason = why_padded(eager)
    assert reason == "BertForSequenceClassification computes its attention in a way of its own"
    dropping = build("bert")
    dropping.config.layerdrop = 0.1
    reason = why_padded(dropping)
    assert reason == "BertForSequenceClassification leaves out blocks at random (layerdrop)"


def without_blocks() -> nn.Module:
    class Bare(nn.Module):
        config = transformers.PretrainedConfig()

    return Bare()

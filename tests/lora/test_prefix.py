"""Prefix tuning against PEFT, and against attention written out in NumPy."""

import copy
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from tiny_image_chat import make_config, make_tokenizer
from torch import nn

from lora_cli.errors import UserError
from lora_cli.lora.prefix import NAME, STATE, put_prefix, without_prefix

SMALL = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "num_labels": 3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**SMALL, "num_key_value_heads": 2, "head_dim": 8}
ONES = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "num_labels": 3, "vocab_size": 60}
CONFIGS: dict[str, Any] = {
    "bert": transformers.BertConfig(**SMALL),
    "roberta": transformers.RobertaConfig(**SMALL),
    "xlm-roberta": transformers.XLMRobertaConfig(**SMALL),
    "electra": transformers.ElectraConfig(**SMALL, embedding_size=32),
    "gpt2": transformers.GPT2Config(**ONES, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "llama": transformers.LlamaConfig(**GROUPED),
    "qwen3": transformers.Qwen3Config(**{**GROUPED, "head_dim": 16}),
    "gemma2": transformers.Gemma2Config(**GROUPED, sliding_window=8),
    "gemma3_text": transformers.Gemma3TextConfig(
        **GROUPED,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "mistral": transformers.MistralConfig(**GROUPED, sliding_window=8),
    "opt": transformers.OPTConfig(
        **ONES, hidden_size=32, word_embed_proj_dim=32, num_hidden_layers=2, num_attention_heads=4,
        ffn_dim=64, max_position_embeddings=64
    ),
    "gpt_neox": transformers.GPTNeoXConfig(**SMALL),
    "bloom": transformers.BloomConfig(**ONES, hidden_size=32, n_layer=2, n_head=4),
    "falcon": transformers.FalconConfig(
        **ONES, hidden_size=32, num_hidden_layers=2, num_attention_heads=4
    ),
}  # fmt: skip
IDS = torch.tensor([[11, 5, 7, 9, 3, 4, 8], [12, 6, 4, 21, 33, 0, 0]])
MASK = torch.tensor([[1] * 7, [1] * 5 + [0] * 2])


def build(config: Any, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_config(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.to(dtype).eval()


def to_peft(model: Any, ours: Any) -> Any:
    """PEFT's model of the same base, with the numbers of our prefix in it."""
    size = ours.get_submodule(NAME).size
    config = peft.PrefixTuningConfig(
        task_type="SEQ_CLS",
        num_virtual_tokens=size.num_tokens,
        # What PEFT makes up for itself is wrong for Falcon, whose heads share one key.
        num_attention_heads=size.num_heads,
        token_dim=size.token_size,
    )
    theirs = peft.get_peft_model(model, config).eval()
    embedding = theirs.prompt_encoder.default.embedding.weight
    assert embedding.shape == size.shape
    with torch.no_grad():
        embedding.copy_(ours.get_submodule(NAME).embeddings)
    return theirs


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("family", "num_tokens"),
    # Longer than the window of the layers that have one.
    [*((name, 5) for name in CONFIGS), ("gemma2", 11), ("gemma3_text", 11), ("mistral", 11)],
)
def test_logits_and_gradients_are_those_of_peft(family: str, num_tokens: int) -> None:
    model = build(CONFIGS[family])
    ours = copy.deepcopy(model)
    before = ours(input_ids=IDS, attention_mask=MASK).logits
    put_prefix(ours, num_tokens=num_tokens, seed=3)
    theirs = to_peft(model, ours)
    grads = {}
    for name, one in (("ours", ours), ("theirs", theirs)):
        logits = one(input_ids=IDS, attention_mask=MASK).logits
        logits.square().sum().backward()
        grads[name] = (logits.detach(), dict(one.named_parameters()))
    (found, parameters), (wanted, others) = grads["ours"], grads["theirs"]
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0)
    gradient = parameters[STATE].grad
    torch.testing.assert_close(
        gradient, others["prompt_encoder.default.embedding.weight"].grad, atol=1e-5, rtol=1e-4
    )
    assert gradient is not None
    # All layers of Mistral have a window, and no token sees the first ones of a long prefix.
    assert gradient.abs().sum(1).max() > 0
    assert (gradient.abs().sum(1).min() > 0) == ((family, num_tokens) != ("mistral", 11))
    assert (found - before).abs().max() > 1e-3


def test_it_is_attention_with_more_keys_and_values() -> None:
    """One layer of BERT by hand: softmax over prefix and text, positions after the prefix."""
    config = transformers.BertConfig(**{**SMALL, "num_hidden_layers": 1})
    model = build(config).bert
    put_prefix(model, num_tokens=3, seed=1)
    own = model.encoder.layer[0].attention.self
    seen: dict[str, torch.Tensor] = {}
    own.register_forward_hook(lambda _m, args, out: seen.update(x=args[0], y=out[0]))
    tables: dict[str, torch.Tensor] = {}
    model.embeddings.position_embeddings.register_forward_hook(
        lambda _m, args, _o: tables.update(positions=args[0])
    )
    with torch.no_grad():
        model(input_ids=IDS, attention_mask=MASK)
    assert tables["positions"].tolist()[0] == [3, 4, 5, 6, 7, 8, 9]

    def heads(layer: nn.Linear) -> np.ndarray:
        y = (seen["x"] @ layer.weight.T + layer.bias).detach().double().numpy()
        return y.reshape(2, 7, 4, 8).transpose(0, 2, 1, 3)

    rows = model.get_submodule(NAME).embeddings.detach().double().numpy()
    keys, values = rows.reshape(3, 2, 4, 8).transpose(1, 2, 0, 3)
    q, k, v = heads(own.query), heads(own.key), heads(own.value)
    k = np.concatenate([np.broadcast_to(keys, (2, *keys.shape)), k], axis=2)
    v = np.concatenate([np.broadcast_to(values, (2, *values.shape)), v], axis=2)
    scores = q @ k.transpose(0, 1, 3, 2) / np.sqrt(8)
    masked = np.concatenate([np.ones((2, 3)), MASK.numpy()], axis=1)[:, None, None, :]
    scores = np.where(masked > 0, scores, -np.inf)
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    expected = (shares @ v).transpose(0, 2, 1, 3).reshape(2, 7, 32)
    np.testing.assert_allclose(seen["y"].numpy(), expected, atol=1e-5)


def test_it_starts_as_what_the_model_keeps_of_real_tokens() -> None:
    model = build(CONFIGS["llama"])
    reference = copy.deepcopy(model)
    before = torch.random.get_rng_state()
    size = put_prefix(model, num_tokens=4, seed=9)
    assert torch.equal(torch.random.get_rng_state(), before)
    generator = torch.Generator().manual_seed(9)
    tokens = torch.randint(60, (1, 4), generator=generator)
    tokens[tokens == 0] = 1
    cache = transformers.DynamicCache()
    with torch.no_grad():
        reference.model(tokens, past_key_values=cache)
    rows = model.get_submodule(NAME).embeddings.view(4, 2, 2, 2, 8)
    for index, layer in enumerate(cache.layers):
        torch.testing.assert_close(rows[:, index, 0].transpose(0, 1), layer.keys[0])
        torch.testing.assert_close(rows[:, index, 1].transpose(0, 1), layer.values[0])
    assert (size.num_heads, size.head_size, size.token_size) == (2, 8, 16)
    # Text that goes on after these tokens is what the prefix says.
    with torch.no_grad():
        whole = torch.cat([tokens.expand(2, -1), IDS], dim=1)
        mask = torch.cat([torch.ones(2, 4, dtype=torch.long), MASK], dim=1)
        wanted = reference(input_ids=whole, attention_mask=mask).logits
        torch.testing.assert_close(
            model(input_ids=IDS, attention_mask=MASK).logits, wanted, atol=1e-5, rtol=1e-4
        )


def test_it_can_be_left_out_and_comes_back() -> None:
    model = build(CONFIGS["bert"])
    before = model(IDS, MASK).logits
    put_prefix(model, num_tokens=2, seed=0)
    after = model(IDS, MASK).logits
    with without_prefix(model):
        assert torch.equal(model(IDS, MASK).logits, before)
    assert torch.equal(model(IDS, MASK).logits, after)
    assert not torch.equal(before, after)
    with without_prefix(build(CONFIGS["bert"])):
        pass


def test_no_mask_means_that_all_is_seen() -> None:
    model = build(CONFIGS["bert"])
    put_prefix(model, num_tokens=2, seed=0)
    with_mask = model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
    torch.testing.assert_close(model(input_ids=IDS).logits, with_mask)


def test_a_coarse_base_keeps_a_float32_prefix() -> None:
    model = build(CONFIGS["gpt2"], torch.bfloat16)
    put_prefix(model, num_tokens=2, seed=0)
    assert model.get_submodule(NAME).embeddings.dtype == torch.float32
    logits = model(input_ids=IDS, attention_mask=MASK).logits
    assert logits.dtype == torch.bfloat16
    logits.float().sum().backward()
    assert model.get_submodule(NAME).embeddings.grad.abs().sum() > 0


def test_a_cache_without_the_prefix_is_refused() -> None:
    model = build(CONFIGS["gpt2"])
    cache = transformers.DynamicCache()
    model(input_ids=IDS, past_key_values=cache)
    put_prefix(model, num_tokens=2, seed=0)
    with pytest.raises(ValueError, match="without a cache"):
        model(input_ids=IDS, past_key_values=cache)


def test_an_empty_cache_gets_the_prefix_once() -> None:
    """Token by token the model says what it says of all at once, positions given or not."""
    model = build(CONFIGS["gpt2"])
    put_prefix(model, num_tokens=2, seed=0)
    body = model.base_model
    whole = body(input_ids=IDS)[0]
    for given in (False, True):
        cache = transformers.DynamicCache()
        for place in range(IDS.shape[1]):
            positions = {"position_ids": torch.tensor([[place]])} if given else {}
            found = body(input_ids=IDS[:, [place]], past_key_values=cache, **positions)[0]
            torch.testing.assert_close(found[:, 0], whole[:, place], atol=1e-5, rtol=1e-4)
        assert cache.get_seq_length() == IDS.shape[1] + 2


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("config", "why"),
    [
        (transformers.AlbertConfig(**SMALL, embedding_size=8), "the attention of albert"),
        (
            transformers.DistilBertConfig(
                vocab_size=60, dim=32, n_layers=2, n_heads=4, hidden_dim=64, num_labels=3
            ),
            "the attention of distilbert",
        ),
        (transformers.DebertaV2Config(**SMALL), "the attention of deberta-v2"),
        (
            transformers.ModernBertConfig(**SMALL, cls_token_id=3, sep_token_id=4),
            "the attention of modernbert",
        ),
        (
            transformers.T5Config(**ONES, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4),
            "t5 has two stacks",
        ),
    ],
)
def test_models_that_take_no_keys_from_elsewhere_are_refused(config: Any, why: str) -> None:
    model = build(config)
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(UserError, match=why):
        put_prefix(model, num_tokens=5, seed=0)
    assert [name for name, _ in model.named_modules()] == names
    assert not model.base_model._forward_pre_hooks
    # PEFT has no way either: it refuses, or fails in the first forward pass.
    with pytest.raises((ValueError, RuntimeError)):
        run_with_peft(build(config))


def run_with_peft(model: Any) -> None:
    config = peft.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=5)
    ids = IDS.clone()
    ids[:, -1] = 2
    peft.get_peft_model(model, config)(input_ids=ids, attention_mask=MASK)


def test_models_that_look_at_images_are_refused() -> None:
    config = make_config("qwen2_vl", make_tokenizer())
    model = transformers.AutoModelForImageTextToText.from_config(config)
    with pytest.raises(UserError, match="qwen2_vl counts the places of images by itself"):
        put_prefix(model, num_tokens=5, seed=0)
    assert not model.base_model._forward_pre_hooks

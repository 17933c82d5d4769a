import dataclasses
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from lora_cli.config.generation import GenerationConfig
from lora_cli.lora.prefix import put_prefix
from lora_cli.models.base import load_base, load_tokenizer
from lora_cli.models.sources import resolve_model
from lora_cli.tasks.generation import (
    as_rows,
    as_tensor,
    can_generate,
    generate,
    have_ended,
    pad_left,
    text_of,
)

DECODERS = ("llama", "gpt2", "qwen2", "gpt_neox")
PAIRS = ("t5", "bart", "marian", "bert2bert")
START = {"decoder_start_token_id": 2}
Loaded = tuple[Any, Any]


@pytest.fixture(scope="module")
def load(tiny_language_dir: Callable[..., Path]) -> Callable[[str], Loaded]:
    kept: dict[str, Loaded] = {}

    def get(kind: str) -> Loaded:
        if kind not in kept:
            source = resolve_model(str(tiny_language_dir(kind)), revision=None)
            auto = "AutoModelForCausalLM" if kind in DECODERS else "AutoModelForSeq2SeqLM"
            base = load_base(source, auto_class=auto, options={}, dtype="auto", seed=0)
            kept[kind] = base.model, load_tokenizer(source)
        return kept[kind]

    return get


def prompts(count: int = 5) -> list[list[int]]:
    draw = random.Random(1)
    return [draw.choices(range(5, 60), k=draw.randint(1, 9)) for _ in range(count)]


def write(loaded: Loaded, rows: list[list[int]], names: Any = None, **settings: Any) -> Any:
    model, tokenizer = loaded
    config = GenerationConfig(**{"max_new_tokens": 12, **settings})
    names = names or [str(n) for n in range(len(rows))]
    options = START if model.config.model_type == "encoder-decoder" else None
    return generate(model, tokenizer, rows, config, ids=names, options=options)


SEARCHES = (
    {},
    {"num_beams": 3, "length_penalty": 0.5},
    {"do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.9, "seed": 3},
    {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    {"stop": ("was", "not")},
    {"stop": ("was", "not"), "num_beams": 2},
)


@pytest.mark.parametrize("search", SEARCHES, ids=lambda one: "-".join(one) or "greedy")
@pytest.mark.parametrize("kind", [*DECODERS, *PAIRS])
def test_batches_say_what_single_rows_say(load: Any, kind: str, search: dict[str, Any]) -> None:
    loaded, rows = load(kind), prompts()
    together = write(loaded, rows, **search)
    alone = [write(loaded, [row], [str(n)], **search)[0] for n, row in enumerate(rows)]
    assert together == alone
    assert len({tuple(row) for row in together}) > 2, "rows differ, or nothing is shown"
    assert all(1 <= len(row) <= 12 for row in together)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5", "bart"])
def test_greedy_is_the_most_probable_token_each_time(load: Any, kind: str) -> None:
    """Against a loop that keeps no cache and pads nothing."""
    model, tokenizer = load(kind)
    for row in prompts(3):
        (found,) = write((model, tokenizer), [row])
        start = model.config.decoder_start_token_id if kind in PAIRS else None
        said = [start] if kind in PAIRS else list(row)
        wanted: list[int] = []
        while len(wanted) < 12 and 3 not in wanted:
            inputs = {"input_ids": torch.tensor([row if kind in PAIRS else said])}
            if kind in PAIRS:
                inputs["decoder_input_ids"] = torch.tensor([said])
            with torch.no_grad():
                token = int(model(**inputs, use_cache=False).logits[0, -1].argmax())
            wanted, said = [*wanted, token], [*said, token]
        assert found == wanted


def test_beams_find_what_is_at_least_as_probable(load: Any) -> None:
    model, tokenizer = load("gpt2")
    tokenizer_end = tokenizer.eos_token_id
    better = 0
    for row in prompts(8):
        sums = []
        for beams in (1, 8):
            (found,) = write((model, tokenizer), [row], num_beams=beams, max_new_tokens=3)
            if tokenizer_end in found:
                break
            ids = torch.tensor([[*row, *found]])
            with torch.no_grad():
                said = model(ids).logits[0, len(row) - 1 : -1].log_softmax(-1)
            sums.append(float(said.gather(1, torch.tensor(found).unsqueeze(1)).sum()))
        if len(sums) == 2:
            assert sums[1] >= sums[0] - 1e-5
            better += sums[1] > sums[0] + 1e-5
    assert better


def test_draws_have_the_probabilities_of_the_model(load: Any) -> None:
    """Chi-square of 3,000 first tokens, over those that are not rare, against softmax."""
    model, tokenizer = load("llama")
    row, count = prompts(1)[0], 3000
    config = GenerationConfig(max_new_tokens=1, do_sample=True, temperature=2.0, top_k=6)
    found = generate(model, tokenizer, [row] * count, config, ids=[str(n) for n in range(count)])
    with torch.no_grad():
        logits = model(torch.tensor([row])).logits[0, -1].double() / 2
    best = logits.topk(6)
    wanted = dict(zip(best.indices.tolist(), best.values.softmax(-1).tolist(), strict=True))
    seen = [tokens[0] for tokens in found]
    assert set(seen) <= set(wanted)
    chi = sum((seen.count(t) - count * p) ** 2 / (count * p) for t, p in wanted.items())
    assert chi < 20.5, "one in a thousand of 5 degrees of freedom"


def test_a_nucleus_leaves_out_the_rest(load: Any) -> None:
    loaded, row = load("llama"), prompts(1)[0]
    with torch.no_grad():
        chances = loaded[0](torch.tensor([row])).logits[0, -1].softmax(-1)
    top = float(chances.max())
    found = write(loaded, [row] * 40, do_sample=True, top_p=top * 0.9, max_new_tokens=1)
    assert found == [[int(chances.argmax())]] * 40
    free = write(loaded, [row] * 40, do_sample=True, max_new_tokens=1)
    assert len({tuple(one) for one in free}) > 5


def test_draws_depend_on_seed_and_row_id_alone(load: Any) -> None:
    loaded, (row, *_) = load("gpt2"), prompts()
    first = write(loaded, [row, row], ["a", "b"], do_sample=True)
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    assert write(loaded, [row, row], ["b", "a"], do_sample=True) == first[::-1]
    assert torch.equal(torch.random.get_rng_state(), before), "the caller's state is kept"
    assert first[0] != first[1]
    assert write(loaded, [row], ["a"], do_sample=True, seed=1) != first[:1]


def test_padding_does_not_change_losses(load: Any) -> None:
    for kind in DECODERS:
        model, tokenizer = load(kind)
        rows = prompts()
        left = pad_left(rows, padding=tokenizer.pad_token_id, device=torch.device("cpu"))
        with torch.no_grad():
            logits = model(**left).logits
            for n, row in enumerate(rows):
                alone = model(torch.tensor([row])).logits[0]
                torch.testing.assert_close(logits[n, -len(row) :], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "t5", "bart"])
@pytest.mark.parametrize("beams", [1, 3])
def test_stop_texts_end_the_writing(load: Any, kind: str, beams: int) -> None:
    """What is written is what would be written without them, up to the first of them."""
    loaded, rows = load(kind), prompts(12)
    tokenizer, free = loaded[1], write(loaded, rows)
    words = [tokenizer.decode(row).split() for row in free]
    stop = (words[0][2], words[1][-1])
    found = write(loaded, rows, stop=stop, num_beams=beams)
    config = GenerationConfig(stop=stop)
    for row, whole in zip(found, free, strict=True):
        text = tokenizer.decode(row)
        inside = [one for one in stop if one in text]
        assert not inside or any(one in tokenizer.decode(row[-1:]) for one in stop)
        assert not any(one in text_of(tokenizer, row, config) for one in stop)
        if beams == 1:
            assert row == whole[: len(row)]
    assert any(len(a) < len(b) for a, b in zip(found, free, strict=True))
    ended = have_ended(loaded[0], tokenizer, found, config)
    own = [loaded[0].generation_config.eos_token_id, tokenizer.eos_token_id]
    assert ended == [
        row[-1] in own or any(one in tokenizer.decode(row) for one in stop) for row in found
    ]
    assert any(ended)


def test_a_row_ends_with_its_end_token(load: Any) -> None:
    model, tokenizer = load("llama")
    rows = prompts(8)
    free = write((model, tokenizer), rows)
    end = free[0][3]
    config = GenerationConfig(max_new_tokens=12)
    found = generate(model, tokenizer, rows, config, ids=["x"] * 8, options={"eos_token_id": [end]})
    for row, whole in zip(found, free, strict=True):
        wanted = whole[: whole.index(end) + 1] if end in whole else whole
        assert row == wanted
    assert found[0][-1] == end
    ended = have_ended(model, tokenizer, [*found, []], config, end_ids=[end])
    own = {end, tokenizer.eos_token_id, model.generation_config.eos_token_id}
    assert ended == [not own.isdisjoint(row) for row in [*found, []]]
    assert False in ended[:-1]
    assert have_ended(model, tokenizer, found[:1], config) == [False]


def test_padding_may_be_the_end_token(load: Any) -> None:
    model, tokenizer = load("gpt2")
    own = model.generation_config
    try:
        model.generation_config = transformers.GenerationConfig(eos_token_id=3, pad_token_id=3)
        rows = prompts()
        together = write((model, tokenizer), rows)
        assert together == [write((model, tokenizer), [row])[0] for row in rows]
    finally:
        model.generation_config = own


def test_the_search_of_the_model_itself_is_left_out(load: Any) -> None:
    model, tokenizer = load("t5")
    plain = write((model, tokenizer), prompts())
    own = model.generation_config
    strange = transformers.GenerationConfig(
        **{**own.to_dict(), "num_beams": 4, "min_length": 11, "do_sample": True, "top_k": 2},
    )
    try:
        model.generation_config = strange
        assert write((model, tokenizer), prompts()) == plain
        assert model.generation_config is strange
    finally:
        model.generation_config = own


def test_what_the_model_says_of_its_tokens_is_kept(load: Any) -> None:
    model, tokenizer = load("bart")
    own = model.generation_config
    try:
        model.generation_config = transformers.GenerationConfig(
            **{**own.to_dict(), "forced_bos_token_id": 9, "suppress_tokens": [11, 12]}
        )
        found = write((model, tokenizer), prompts(8))
    finally:
        model.generation_config = own
    assert {row[0] for row in found} == {9}
    assert not {11, 12} & {token for row in found for token in row}
    forced = generate(
        model, tokenizer, prompts(2), GenerationConfig(max_new_tokens=4), ids=["1", "2"],
        options={"forced_bos_token_id": 21},
    )  # fmt: skip
    assert {row[0] for row in forced} == {21}


def test_rows_end_where_the_positions_of_the_model_end(load: Any) -> None:
    """The tiny models have 64."""
    model, tokenizer = load("gpt2")
    rows = [[7] * 3, [8] * 60, [9] * 64, [9] * 65]
    config = GenerationConfig(max_new_tokens=9)
    found = generate(model, tokenizer, rows, config, ids=list("abcd"))
    assert [len(row) for row in found] == [9, 5, 1, 0]
    assert found == [generate(model, tokenizer, [row], config, ids=["a"])[0] for row in rows]


def test_modes_and_wrappers(load: Any) -> None:
    model, tokenizer = load("llama")

    class Wrapped(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    plain = write((model, tokenizer), prompts())
    config = GenerationConfig(max_new_tokens=12)
    wrapped = Wrapped(model).train()
    model.model.norm.eval()
    names = [str(n) for n in range(5)]
    assert generate(wrapped, tokenizer, prompts(), config, ids=names) == plain
    assert model.training, "modes are as before"
    assert not model.model.norm.training
    model.eval()
    assert can_generate(wrapped)
    assert not can_generate(lambda: None)


def test_a_prefix_is_there_when_it_writes(tiny_language_dir: Callable[..., Path]) -> None:
    """Against passes without a cache, in which the prefix is put before the text each time."""
    model: Any = transformers.GPT2LMHeadModel.from_pretrained(tiny_language_dir("gpt2")).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_language_dir("gpt2"))
    rows = prompts()
    without = write((model, tokenizer), rows)
    put_prefix(model, num_tokens=4, seed=0)
    nn.init.normal_(model.prefix_tuning.embeddings)
    found = write((model, tokenizer), rows)
    assert found != without
    for row, written in zip(rows, found, strict=True):
        ids = [*row, *written]
        with torch.no_grad():
            best = model(torch.tensor([ids])).logits[0].argmax(-1).tolist()
        assert best[len(row) - 1 : -1] == written


def test_tensors_of_rows() -> None:
    rows = [[1, 2, 3], [], [4]]
    tensor = as_tensor(rows, device=torch.device("cpu"))
    assert tensor.tolist() == [[1, 2, 3], [-1, -1, -1], [4, -1, -1]]
    assert as_rows(tensor) == rows
    assert as_tensor([[], []], device=torch.device("cpu")).shape == (2, 0)


def test_every_setting_changes_something(load: Any) -> None:
    plain = GenerationConfig(max_new_tokens=12)
    loaded, rows = load("gpt2"), prompts(12)
    base = write(loaded, rows)
    sampled = {"do_sample": True}
    changes: dict[str, Any] = {
        "max_new_tokens": {"max_new_tokens": 3},
        "num_beams": {"num_beams": 4},
        "do_sample": sampled,
        "repetition_penalty": {"repetition_penalty": 2.0},
        "no_repeat_ngram_size": {"no_repeat_ngram_size": 1},
        "stop": {"stop": ("a",)},
    }
    for name, settings in changes.items():
        assert write(loaded, rows, **settings) != base, name
    for name, value in (("temperature", 5.0), ("top_p", 0.3), ("top_k", 2), ("seed", 1)):
        changes[name] = {**sampled, name: value}
        assert write(loaded, rows, **changes[name]) != write(loaded, rows, **sampled), name
    changes["length_penalty"] = {"num_beams": 4, "length_penalty": -8.0}
    ends = [tokens[3] for tokens in base]
    found = [
        generate(
            *loaded, rows, GenerationConfig(max_new_tokens=12, num_beams=4, length_penalty=penalty),
            ids=["x"] * 12, options={"eos_token_id": ends},
        )
        for penalty in (1.0, -8.0)
    ]  # fmt: skip
    assert found[0] != found[1]
    assert set(changes) == {one.name for one in dataclasses.fields(plain)}

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lora_cli.errors import UserError
from lora_cli.tasks.windows import WindowReader, best_spans, find_answer, trim

QUESTION = "who see the film?"
CONTEXT = "a man and a woman watch the old film in the city, 北京 xyz. " * 3


@pytest.fixture
def bert(tiny_model_dir: Callable[..., Path]) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model_dir())


@pytest.fixture(scope="session")
def roberta() -> Any:
    """Bytes, no token types, two separators between question and context, spaces in the spans."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<s>", "<pad>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    made.train_from_iterator([CONTEXT], trainer)
    made.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), trim_offsets=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token="<s>",
        cls_token="<s>",
        eos_token="</s>",
        sep_token="</s>",
        pad_token="<pad>",
        model_input_names=["input_ids", "attention_mask"],
    )


@pytest.fixture(params=["bert", "roberta"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize(("max_length", "stride"), [(24, 4), (32, 0), (40, 12), (400, 60)])
def test_windows_are_those_of_the_tokenizer(tokenizer: Any, max_length: int, stride: int) -> None:
    windows, cut = WindowReader(tokenizer, max_length=max_length, stride=stride).read(
        "who?", CONTEXT
    )
    expected = tokenizer(
        "who?",
        CONTEXT,
        truncation="only_second",
        max_length=max_length,
        stride=stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    assert cut == 0
    assert len(windows) == len(expected["input_ids"])
    for n, window in enumerate(windows):
        assert set(window["inputs"]) == set(tokenizer.model_input_names)
        for name in tokenizer.model_input_names:
            assert window["inputs"][name] == expected[name][n]
        owners = expected.sequence_ids(n)
        places = [place for place, owner in enumerate(owners) if owner == 1]
        assert window["places"] == places
        assert window["spans"] == [list(expected["offset_mapping"][n][p]) for p in places]
        assert window["none"] == 0


def test_a_question_leaves_half_to_the_context(tokenizer: Any) -> None:
    special = tokenizer.num_special_tokens_to_add(pair=True)
    question = "who see the film " * 9
    windows, cut = WindowReader(tokenizer, max_length=32, stride=None).read(question, CONTEXT)
    tokens = len(tokenizer(question, add_special_tokens=False)["input_ids"])
    kept = (32 - special) // 2
    assert cut == tokens - kept
    first = windows[0]["inputs"]["input_ids"]
    assert first[1 : 1 + kept] == tokenizer(question)["input_ids"][1 : 1 + kept]
    assert len(first) == 32
    assert len(windows[0]["places"]) == 32 - special - kept
    # The whole context is read.
    ids = {
        w["first"] + n: w["inputs"]["input_ids"][p]
        for w in windows
        for n, p in enumerate(w["places"])
    }
    assert list(ids.values()) == tokenizer(CONTEXT, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("text", ["man", "北京 xyz", "watch the old film", "a", "xyz. "])
def test_an_answer_is_found_in_the_windows_that_have_it(tokenizer: Any, text: str) -> None:
    begin = CONTEXT.rindex(f" {text}") + 1
    windows, _ = WindowReader(tokenizer, max_length=40, stride=16).read(QUESTION, CONTEXT)
    found = find_answer(windows, (text, begin))
    assert any(
        places != (window["none"],) * 2 for places, window in zip(found, windows, strict=True)
    )
    for (first, last), window in zip(found, windows, strict=True):
        assert first is not None
        assert last is not None
        inside = (
            window["spans"][0][0] <= begin and begin + len(text.strip()) <= window["spans"][-1][1]
        )
        if not inside:
            assert first == last == window["none"]
            continue
        spans = dict(zip(window["places"], window["spans"], strict=True))
        part = trim(CONTEXT, spans[first][0], spans[last][1])
        assert CONTEXT[slice(*part)] == text.strip()
    assert find_answer(windows, None) == [(window["none"],) * 2 for window in windows]


def test_an_answer_longer_than_a_window_is_learned_in_parts(bert: Any) -> None:
    windows, _ = WindowReader(bert, max_length=24, stride=0).read("who?", CONTEXT)
    begin, end = CONTEXT.index("woman"), CONTEXT.rindex("film") + 4
    found = find_answer(windows, (CONTEXT[begin:end], begin))
    firsts = [first for first, _ in found]
    lasts = [last for _, last in found]
    assert len(windows) > 3
    assert (None, None) in found
    assert all(None in places for places in found)
    for places, place in ((firsts, begin), (lasts, end)):
        ((n, token),) = [(n, x) for n, x in enumerate(places) if x is not None]
        spans = dict(zip(windows[n]["places"], windows[n]["spans"], strict=True))
        assert place in spans[token]


def test_an_answer_without_a_token_teaches_nothing(bert: Any) -> None:
    windows, _ = WindowReader(bert, max_length=24, stride=2).read("who?", "a \u200d film")
    assert windows[0]["spans"] == [[0, 1], [4, 8]]
    assert find_answer(windows, ("\u200d", 2)) == [(None, None)]


@given(
    st.lists(st.tuples(*[st.integers(-9, 9)] * 2), min_size=1, max_size=9),
    st.integers(1, 12),
    st.integers(1, 30),
)
def test_best_spans_are_the_best_of_all(scores: list[Any], max_length: int, count: int) -> None:
    start = torch.tensor([float(x) for x, _ in scores])
    end = torch.tensor([float(x) for _, x in scores])
    possible = {
        (i, j): scores[i][0] + scores[j][1]
        for i in range(len(scores))
        for j in range(i, min(len(scores), i + max_length))
    }
    found = best_spans(start, end, max_length=max_length, count=count)
    # Those that are too long for the end of the context take no place of others, but at the end.
    expected = sorted(possible.values(), reverse=True)[:count]
    assert [score for _, _, score in found] == expected
    assert all(possible[i, j] == score for i, j, score in found)
    assert len({(i, j) for i, j, _ in found}) == len(found)


def test_nothing_is_best_of_nothing() -> None:
    assert best_spans(torch.zeros(0), torch.zeros(0), max_length=3, count=2) == []


def test_a_stride_that_stands_still_is_refused(bert: Any) -> None:
    with pytest.raises(UserError) as caught:
        WindowReader(bert, max_length=32, stride=15)
    (problem,) = caught.value.problems
    assert problem.id == "task.stride"
    assert "must be less than 15" in problem.message
    assert WindowReader(bert, max_length=32, stride=14).read(QUESTION * 9, CONTEXT)


def test_a_tokenizer_that_does_not_tell_places_is_refused() -> None:
    with pytest.raises(UserError, match="where each token is in its text"):
        WindowReader(SimpleNamespace(is_fast=False), max_length=32, stride=None)

"""Tokenizers in the words of llama.cpp, rebuilt from them by its own rules."""

from typing import Any

import pytest
import transformers
from tiny_llama import TEMPLATE, TEXTS, byte_tokenizer
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

from lora_cli.artifacts.exporters.gguf_tokenizer import (
    Vocabulary,
    read_vocabulary,
    why_no_vocabulary,
)

# From llama.cpp's table of regular expressions by name, applied one after the other.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
EXPRESSIONS = {
    "gpt-2": [GPT2],
    "smollm": [r"\p{N}", GPT2],
    "llama-bpe": [
        r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ],
}


def rebuilt(found: Vocabulary) -> Tokenizer:
    """A tokenizer that does what llama.cpp says that it does with such a file."""
    numbers = {token: number for number, token in enumerate(found.tokens)}
    pairs = [tuple(merge.split(" ")) for merge in found.merges]
    made = Tokenizer(models.BPE(numbers, pairs, ignore_merges=found.cut == "llama-bpe"))
    cuts = [pre_tokenizers.Split(Regex(one), behavior="isolated") for one in EXPRESSIONS[found.cut]]
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.pre_tokenizer = pre_tokenizers.Sequence([*cuts, whole])
    for kind, special in (("CONTROL", True), ("USER_DEFINED", False)):
        own = [t for t, k in zip(found.tokens, found.kinds, strict=True) if k == kind]
        tokens = [AddedToken(token, special=special, normalized=False) for token in own]
        made.add_special_tokens(tokens) if special else made.add_tokens(tokens)
    return made


@pytest.mark.parametrize("cut", EXPRESSIONS)
def test_llama_cpps_rules_give_the_same_tokens(cut: str) -> None:
    tokenizer = byte_tokenizer(cut)
    assert why_no_vocabulary(tokenizer) is None
    found = read_vocabulary(tokenizer, size=len(tokenizer) + 3)
    assert found.cut == cut
    made = rebuilt(found)
    for text in TEXTS:
        ids = made.encode(text).ids
        if found.adds_bos:
            ids = [found.ids["bos"], *ids]
        assert ids == tokenizer(text)["input_ids"], text
    assert found.adds_bos == (cut == "llama-bpe")
    assert not found.adds_eos


def test_cuts_differ_so_that_a_wrong_name_would_show() -> None:
    tokens = {cut: byte_tokenizer(cut).tokenize(" 22 it'S\n\nx 1234") for cut in EXPRESSIONS}
    assert len({tuple(found) for found in tokens.values()}) == 3


def test_rows_without_a_token_have_names_and_kinds_are_told() -> None:
    tokenizer = byte_tokenizer()
    size = len(tokenizer)
    found = read_vocabulary(tokenizer, size=size + 2)
    assert found.tokens[-2:] == (f"[PAD{size}]", f"[PAD{size + 1}]")
    assert found.kinds[-3:] == ("USER_DEFINED", "UNUSED", "UNUSED")
    assert found.kinds[:4] == ("CONTROL", "CONTROL", "CONTROL", "NORMAL")
    assert found.ids == {"bos": 0, "eos": 1, "pad": 1}
    assert found.chat_template == TEMPLATE
    assert read_vocabulary(byte_tokenizer(template=None), size=size).chat_template is None


def changed(**parts: Any) -> Any:
    tokenizer = byte_tokenizer()
    for name, value in parts.items():
        setattr(tokenizer.backend_tokenizer, name, value)
    return tokenizer


def with_added(**settings: bool) -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken("<mask>", **settings)])
    return tokenizer


def with_ends() -> Any:
    from tokenizers import processors

    after = processors.TemplateProcessing(single="<|user|> $A", special_tokens=[("<|user|>", 2)])
    return changed(post_processor=after)


def unigram() -> Any:
    made = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: object(), "is not of the tokenizers package"),
        (unigram, "is of the kind Unigram"),
        (lambda: changed(model=models.BPE(byte_fallback=True)), "bytes to fall back on"),
        (lambda: changed(model=models.BPE(end_of_word_suffix="</w>")), "end_of_word_suffix"),
        (lambda: changed(normalizer=normalizers.NFKC()), "changes texts"),
        (lambda: changed(pre_tokenizer=pre_tokenizers.Whitespace()), "in a way of its own"),
        (
            lambda: changed(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True)),
            "in a way of its own",
        ),
        (lambda: with_added(lstrip=True), "'<mask>'"),
        (with_ends, "around each text"),
    ],
)
def test_what_llama_cpp_does_not_do_is_refused(make: Any, reason: str) -> None:
    assert reason in str(why_no_vocabulary(make()))

from typing import Any

import pytest
from transformers import MBart50Tokenizer, MBartTokenizer, NllbTokenizer

from lora_cli.errors import UserError
from lora_cli.tasks.languages import language_codes, set_languages

WORDS = ("▁a", "▁b")
PIECES = [(word, 0.0) for word in ("<s>", "<pad>", "</s>", "<unk>", *WORDS)]


def make(kind: str) -> Any:
    """Tokenizers of translation models with two words, and with their own languages."""
    if kind == "mbart":
        return MBartTokenizer(vocab=PIECES)
    if kind == "mbart50":
        return MBart50Tokenizer(vocab=PIECES)
    vocabulary = {word: number for number, (word, _) in enumerate(PIECES)}
    return NllbTokenizer(vocab=vocabulary, merges=[])


@pytest.mark.parametrize(
    ("kind", "source", "target", "option"),
    [
        ("mbart", "fr_XX", "de_DE", "decoder_start_token_id"),
        ("mbart50", "fr_XX", "de_DE", "forced_bos_token_id"),
        ("nllb", "fra_Latn", "zho_Hans", "forced_bos_token_id"),
    ],
)
def test_texts_are_marked_as_of_their_languages(
    kind: str, source: str, target: str, option: str
) -> None:
    tokenizer = make(kind)
    found = set_languages(tokenizer, source_language=source, target_language=target)
    assert found == {option: tokenizer.convert_tokens_to_ids(target)}
    read, wanted = tokenizer("a b")["input_ids"], tokenizer(text_target="a b")["input_ids"]
    assert tokenizer.convert_tokens_to_ids(source) in read
    assert tokenizer.convert_tokens_to_ids(target) not in read
    assert wanted[0 if option == "forced_bos_token_id" else -1] == found[option]
    assert tokenizer("a b")["input_ids"] == read, "a target between changes no source"
    assert target not in tokenizer.decode(wanted, skip_special_tokens=True)


@pytest.mark.parametrize("kind", ["mbart", "mbart50", "nllb"])
def test_unknown_languages_are_refused(kind: str) -> None:
    tokenizer = make(kind)
    with pytest.raises(UserError) as caught:
        set_languages(tokenizer, source_language="german", target_language=None)
    first, second = caught.value.problems
    assert (first.id, first.key) == ("task.unknown-language", "task.source_language")
    assert 'but is "german"' in first.message
    assert second.message.endswith("but is null.")
    assert " more" in (first.allowed or "")
    assert set((first.allowed or "").split(" and ")[0].split(", ")) <= set(
        language_codes(tokenizer)
    )


def test_the_nearest_language_is_named() -> None:
    with pytest.raises(UserError) as caught:
        set_languages(make("mbart"), source_language="en_xx", target_language="de_DE")
    (problem,) = caught.value.problems
    assert problem.fix == 'did you mean "en_XX"?'


def test_most_tokenizers_have_no_languages() -> None:
    class Plain:
        pass

    assert set_languages(Plain(), source_language=None, target_language=None) == {}
    with pytest.raises(UserError) as caught:
        set_languages(Plain(), source_language="en_XX", target_language=None)
    (problem,) = caught.value.problems
    assert (problem.id, problem.key) == ("task.no-languages", "task.source_language")

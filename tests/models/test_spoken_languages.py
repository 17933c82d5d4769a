"""What Whisper's decoder begins with, beside what transformers gives it."""

from types import SimpleNamespace
from typing import Any

import pytest
import transformers

from lora_cli.errors import UserError
from lora_cli.models.spoken_languages import (
    agree_on_language,
    prompt_tokens,
    set_spoken_language,
    space_before,
)
from lora_cli.models.tiny import make_speech_tokenizer


@pytest.fixture
def tokenizer() -> Any:
    return make_speech_tokenizer(["some words", "ein Haus"])


@pytest.mark.parametrize(
    ("language", "translates", "code"),
    [("de", False, "de"), ("German", True, "de"), ("mandarin", False, "zh"), ("YUE", False, "yue")],
)
def test_a_language_is_a_code_or_a_name(
    language: str, translates: bool, code: str, tokenizer: Any
) -> None:
    set_spoken_language(tokenizer, language, translates=translates)
    task = "translate" if translates else "transcribe"
    tokens = ["<|startoftranscript|>", f"<|{code}|>", f"<|{task}|>", "<|notimestamps|>"]
    assert prompt_tokens(tokenizer) == tokenizer.convert_tokens_to_ids(tokens)
    assert tokenizer("")["input_ids"] == [*prompt_tokens(tokenizer), tokenizer.eos_token_id]


def test_the_own_language_of_a_tokenizer_is_kept(tokenizer: Any) -> None:
    assert prompt_tokens(tokenizer) == tokenizer("")["input_ids"][:2]
    set_spoken_language(tokenizer, None, translates=False)
    assert tokenizer.language is None
    tokenizer.set_prefix_tokens(language="german")
    set_spoken_language(tokenizer, None, translates=False)
    assert (tokenizer.language, tokenizer.task) == ("de", "transcribe")


def test_words_have_spaces_before_them(tokenizer: Any) -> None:
    assert space_before(tokenizer) == " "
    for language, translates, space in (("de", False, " "), ("ja", False, ""), ("ja", True, " ")):
        set_spoken_language(tokenizer, language, translates=translates)
        assert space_before(tokenizer) == space


def test_a_language_that_an_older_model_lacks_is_refused(tokenizer: Any) -> None:
    """transformers would take the number behind the last language, which is another token."""
    plain = SimpleNamespace(
        language=None,
        get_vocab=lambda: {n: i for n, i in tokenizer.get_vocab().items() if n != "<|yue|>"},
    )
    with pytest.raises(UserError, match='but is "cantonese"') as caught:
        set_spoken_language(plain, "cantonese", translates=False)
    assert caught.value.problems[0].allowed.endswith("and 87 more, or their English names")
    with pytest.raises(UserError, match='but is "germn"') as caught:
        set_spoken_language(tokenizer, "germn", translates=False)
    assert caught.value.problems[0].fix == 'did you mean "german"?'


def test_settings_of_old_checkpoints_are_made_whole(tokenizer: Any) -> None:
    model: Any = SimpleNamespace(generation_config=transformers.GenerationConfig())
    model.generation_config.forced_decoder_ids = [[1, None], [2, 5]]
    with pytest.raises(UserError, match="but is null"):
        agree_on_language(tokenizer, model)
    set_spoken_language(tokenizer, "fr", translates=True)
    agree_on_language(tokenizer, model)
    found = model.generation_config
    assert found.forced_decoder_ids is None
    prompt = [
        found.decoder_start_token_id,
        found.lang_to_id[f"<|{found.language}|>"],
        found.task_to_id[found.task],
        found.no_timestamps_token_id,
    ]
    assert prompt == prompt_tokens(tokenizer)
    found.is_multilingual = False
    with pytest.raises(UserError, match="knows English alone"):
        agree_on_language(tokenizer, model)

"""The tokens with which Whisper's decoder begins: the language, and whether it is translated.

``<|startoftranscript|> <|en|> <|transcribe|> <|notimestamps|>`` for models of many languages,
``<|startoftranscript|> <|notimestamps|>`` for models of English alone (arXiv:2212.04356, section
2.3). The language is kept in the tokenizer, which is saved with its model, and told to the model's
generation_config.json, so that any program writes what was trained.
"""

from collections.abc import Iterable
from typing import Any

from transformers.models.whisper.tokenization_whisper import LANGUAGES as NAMES
from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

from lora_cli.errors import Problem, UserError, nearest_name

LANGUAGES = tuple(NAMES)
"""Codes of the languages that Whisper knows, in the order of their tokens."""
KEY = "task.language"
START, PLAIN = "<|startoftranscript|>", "<|notimestamps|>"
# Written without spaces between words, and so without one before the first.
_WITHOUT_SPACES = ("zh", "ja", "th", "lo", "my", "yue")
_LISTED = 12
_TASKS = {False: "transcribe", True: "translate"}


def set_spoken_language(tokenizer: Any, language: str | None, *, translates: bool) -> None:
    """Make a tokenizer say what is spoken, in place.

    Args:
        tokenizer: Whisper's.
        language: A code or an English name of a language; None takes the tokenizer's own, which
            models of English alone do not have.
        translates: Whether texts are English translations of what is said.

    Raises:
        UserError: If the tokenizer does not know the language, or has none to translate from.
    """
    language = language or tokenizer.language
    if language is None:
        if translates:
            raise UserError(_nothing_to_translate())
        return
    known = _known_languages(tokenizer)
    code = TO_LANGUAGE_CODE.get(language.lower(), language.lower())
    if code not in known:
        raise UserError(_unknown(language, known))
    tokenizer.set_prefix_tokens(language=code, task=_TASKS[translates], predict_timestamps=False)


def special_tokens(languages: Iterable[str]) -> list[str]:
    """Return the tokens that are no parts of texts, besides the end, in Whisper's order.

    Args:
        languages: Their codes; they are numbered from the start.
    """
    return [START, *(f"<|{name}|>" for name in (*languages, *_TASKS.values())), PLAIN]


def prompt_tokens(tokenizer: Any) -> list[int]:
    """Return the tokens that a decoder is given before it writes, as the tokenizer says them."""
    names = [START]
    if tokenizer.language is not None:
        names += [f"<|{tokenizer.language}|>", f"<|{tokenizer.task}|>"]
    found: list[int] = tokenizer.convert_tokens_to_ids([*names, PLAIN])
    return found


def space_before(tokenizer: Any) -> str:
    """Return what stands before the first word of a text: a space where words have spaces."""
    writes_english = tokenizer.language is None or tokenizer.task == _TASKS[True]
    return "" if not writes_english and tokenizer.language in _WITHOUT_SPACES else " "


def agree_on_language(tokenizer: Any, model: Any) -> None:
    """Tell a model's settings of generation what its tokenizer says; the model is changed in place.

    Raises:
        UserError: If a model of many languages is told none, or one of English alone is told one.
    """
    own, known = model.generation_config, _known_languages(tokenizer)
    has_languages = getattr(own, "is_multilingual", bool(known))
    language = tokenizer.language
    if has_languages == (language is None):
        raise UserError(_english_only(language) if language else _unknown(None, known))
    # transformers makes anew what it has made of a model's config.json, without these settings.
    own._from_model_config = False
    own.return_timestamps = False
    own.is_multilingual = has_languages
    own.no_timestamps_token_id = tokenizer.convert_tokens_to_ids(PLAIN)
    own.decoder_start_token_id = prompt_tokens(tokenizer)[0]
    if language is None:
        return
    # Checkpoints from before these settings force tokens by their places instead.
    own.forced_decoder_ids = None
    own.language, own.task = language, tokenizer.task
    own.lang_to_id = {f"<|{code}|>": number for code, number in known.items()}
    names = list(_TASKS.values())
    numbers = tokenizer.convert_tokens_to_ids([f"<|{name}|>" for name in names])
    own.task_to_id = dict(zip(names, numbers, strict=True))


def _known_languages(tokenizer: Any) -> dict[str, int]:
    """Return the token of each language that a tokenizer has, by its code."""
    tokens = tokenizer.get_vocab()
    return {code: tokens[name] for code in LANGUAGES if (name := f"<|{code}|>") in tokens}


def _unknown(language: str | None, known: dict[str, int]) -> Problem:
    near = nearest_name(language or "", [*known, *(NAMES[code] for code in known)])
    codes = list(known)
    more = f" and {len(codes) - _LISTED} more" if len(codes) > _LISTED else ""
    return Problem(
        id="task.unknown-language",
        message=f"`{KEY}` must be a language of the model's tokenizer, but is "
        + (f'"{language}".' if language is not None else "null."),
        key=KEY,
        allowed=", ".join(codes[:_LISTED]) + more + ", or their English names"
        if codes
        else "null: this tokenizer has no languages",
        fix=f'did you mean "{near}"?' if near else f"{KEY}={codes[0] if codes else 'null'}",
    )


def _english_only(language: str) -> Problem:
    return Problem(
        id="task.no-languages",
        message=f"`{KEY}` must be left out with this model, which knows English alone, but is "
        f'"{language}".',
        key=KEY,
        fix="leave it out, or choose a model of many languages, such as whisper-base",
    )


def _nothing_to_translate() -> Problem:
    return Problem(
        id="task.unknown-language",
        message=f"`{KEY}` must say what language is spoken where task.translate=true, but is null.",
        key=KEY,
        fix=f"{KEY}=de, or another; a model of English alone cannot translate",
    )

"""Languages of multilingual translation models: mBART, mBART-50, M2M100, NLLB.

Their tokenizers mark a text by a token for its language, and their decoders begin with that of the
language to translate into: M2M100, mBART-50 and NLLB with it as the first token that is written,
mBART with it in the place of the start token.
"""

import re
from typing import Any

from lora_cli.errors import Problem, UserError, nearest_name

# As "en_XX", "zho_Hans", "eng_Latn".
_CODE = re.compile(r"[a-z]{2,3}_[A-Za-z]{2,4}")
_LISTED = 12


def language_codes(tokenizer: Any) -> dict[str, int]:
    """Return the token of each language that a tokenizer knows, none for most tokenizers."""
    if found := getattr(tokenizer, "lang_code_to_id", None):
        return dict(found)
    if not hasattr(tokenizer, "src_lang"):
        return {}
    return {
        token: number
        for token, number in tokenizer.get_added_vocab().items()
        if _CODE.fullmatch(token)
    }


def set_languages(
    tokenizer: Any, *, source_language: str | None, target_language: str | None
) -> dict[str, int]:
    """Make a tokenizer mark texts as of two languages, in place.

    Args:
        tokenizer: Of a translation model.
        source_language: Code of the language to translate from.
        target_language: Code of the language to translate into.

    Returns:
        What generation needs of it: ``forced_bos_token_id`` or ``decoder_start_token_id``, or
        nothing for a tokenizer without languages.

    Raises:
        UserError: If a code is none of the tokenizer's, is missing, or is not wanted.
    """
    known = language_codes(tokenizer)
    given = {"source_language": source_language, "target_language": target_language}
    problems = [problem for name, code in given.items() if (problem := _problem(name, code, known))]
    if problems:
        raise UserError(problems)
    if not known:
        return {}
    tokenizer.src_lang, tokenizer.tgt_lang = source_language, target_language
    token = known[target_language or ""]
    marked = list(tokenizer(text_target="")["input_ids"])
    is_first = bool(marked) and marked[0] == token
    return {"forced_bos_token_id" if is_first else "decoder_start_token_id": token}


def _problem(name: str, code: str | None, known: dict[str, int]) -> Problem | None:
    key, codes = f"task.{name}", sorted(known)
    if code is None and not known:
        return None
    if not known:
        return Problem(
            id="task.no-languages",
            message=f"`{key}` must be left out with this model, whose tokenizer has no languages, "
            f'but is "{code}".',
            key=key,
            fix="leave it out; models such as T5 and some of Marian are told by task.prefix",
        )
    if code in known:
        return None
    near = nearest_name(code or "", codes)
    more = f" and {len(codes) - _LISTED} more" if len(codes) > _LISTED else ""
    return Problem(
        id="task.unknown-language",
        message=f"`{key}` must be a language of the model's tokenizer, but is "
        + (f'"{code}".' if code is not None else "null."),
        key=key,
        allowed=", ".join(codes[:_LISTED]) + more,
        fix=f'did you mean "{near}"?' if near else f"{key}={codes[0]}, or another of these",
    )

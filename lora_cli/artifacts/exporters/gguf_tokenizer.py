"""A byte-level BPE tokenizer in the words of llama.cpp, or the reason why it has none for it.

llama.cpp computes tokens itself: it knows a number of ways to cut a text into words by name, merges
bytes within a word by the list of merges in the file, and looks for added tokens before all that.
What it does not do is refused, since another cut of the text is another input of the model.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Names in `gguf.TokenType`, whose package is not needed to say why a tokenizer is refused.
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = "NORMAL", "CONTROL", "USER_DEFINED", "UNUSED"

_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_WORDS = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
_DIGITS = {"type": "Digits", "individual_digits": True}
_SPLIT = {
    "type": "Split",
    "pattern": {"Regex": _LLAMA3_WORDS},
    "behavior": "Isolated",
    "invert": False,
}
# By llama.cpp's name: the steps that cut a text into words, and whether a word that is a token
# is taken without merging.
_CUTS: dict[str, tuple[list[dict[str, Any]], bool]] = {
    "gpt-2": ([_WORDS], False),
    "smollm": ([_DIGITS, _WORDS], False),
    "llama-bpe": ([_SPLIT, _BYTES], True),
}
_SUPPORTED = "byte-level BPE that cuts texts as GPT-2, SmolLM or Llama 3 do"
_TOKEN_NAMES = ("bos", "eos", "unk", "pad")


@dataclass(frozen=True, kw_only=True, slots=True)
class Vocabulary:
    """What a GGUF file holds of a tokenizer.

    Attributes:
        cut: llama.cpp's name of the way to cut a text into words.
        tokens: Every row of the table of embeddings, in order.
        kinds: Of each token its kind, a name of `gguf.TokenType`.
        merges: Pairs of pieces, the first to merge first.
        ids: Numbers of the tokens that begin, end, pad or stand for what is unknown.
        adds_bos: Whether every text begins with such a token.
        adds_eos: Whether every text ends with one.
        chat_template: Jinja, if there is one.
    """

    cut: str
    tokens: tuple[str, ...]
    kinds: tuple[str, ...]
    merges: tuple[str, ...]
    ids: Mapping[str, int]
    adds_bos: bool
    adds_eos: bool
    chat_template: str | None


def why_no_vocabulary(tokenizer: Any) -> str | None:
    """Return why a tokenizer has no form in a GGUF file, as the rest of a sentence, or None."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return f"{type(tokenizer).__name__} is not of the tokenizers package"
    document = json.loads(backend.to_str())
    if fault := _fault_of_model(document["model"]):
        return f"its tokenizer {fault}, and lora-cli writes {_SUPPORTED}"
    if document.get("normalizer"):
        return "its tokenizer changes texts before it cuts them, which llama.cpp does not"
    if _find_cut(document) is None:
        return f"its tokenizer cuts texts in a way of its own, and lora-cli writes {_SUPPORTED}"
    for token in document["added_tokens"]:
        if token["lstrip"] or token["rstrip"] or token["single_word"]:
            return (
                f"its tokenizer has the added token {token['content']!r}, which takes spaces "
                "beside it along or is no part of a word, and llama.cpp has no such tokens"
            )
    return _fault_of_ends(tokenizer)


def _fault_of_model(model: Mapping[str, Any]) -> str | None:
    if model["type"] != "BPE" or model.get("byte_fallback"):
        kind = f"{model['type']}{' with bytes to fall back on' * bool(model.get('byte_fallback'))}"
        return f"is of the kind {kind}"
    for name in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(name):
            return f"has a {name}"
    return None


def _find_cut(document: Mapping[str, Any]) -> str | None:
    found = document.get("pre_tokenizer") or {}
    steps = found.get("pretokenizers", []) if found.get("type") == "Sequence" else [found]
    # Offsets of characters are no part of what is computed.
    steps = [{k: v for k, v in step.items() if k != "trim_offsets"} for step in steps]
    whole = bool(document["model"].get("ignore_merges"))
    names = (name for name, cut in _CUTS.items() if cut == (steps, whole))
    return next(names, None)


def _ends(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the tokens that are put before and after each text."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    starts = [n for n in range(len(whole)) if whole[n : n + len(plain)] == plain]
    start = starts[0] if starts else 0
    return whole[:start], whole[start + len(plain) :]


def _fault_of_ends(tokenizer: Any) -> str | None:
    before, after = _ends(tokenizer)
    if before not in ([], [tokenizer.bos_token_id]) or after not in ([], [tokenizer.eos_token_id]):
        return (
            "its tokenizer puts tokens around each text that are not those of begin and end of a "
            "text, and llama.cpp knows these alone"
        )
    return None


def read_vocabulary(tokenizer: Any, *, size: int) -> Vocabulary:
    """Return what a GGUF file is to hold of a tokenizer that `why_no_vocabulary` let pass.

    Args:
        tokenizer: Of transformers.
        size: Rows of the table of embeddings; those that no token has get names that no text has.
    """
    document = json.loads(tokenizer.backend_tokenizer.to_str())
    added = {token["id"]: token for token in document["added_tokens"]}
    names = {number: token for token, number in tokenizer.get_vocab().items()}
    tokens, kinds = [], []
    for number in range(size):
        if number in added:
            tokens.append(added[number]["content"])
            kinds.append(_CONTROL if added[number]["special"] else _USER_DEFINED)
        else:
            tokens.append(names.get(number, f"[PAD{number}]"))
            kinds.append(_NORMAL if number in names else _UNUSED)
    before, after = _ends(tokenizer)
    ids = {name: getattr(tokenizer, f"{name}_token_id") for name in _TOKEN_NAMES}
    merges = document["model"]["merges"]
    return Vocabulary(
        cut=_find_cut(document) or "",
        tokens=tuple(tokens),
        kinds=tuple(kinds),
        merges=tuple(pair if isinstance(pair, str) else " ".join(pair) for pair in merges),
        ids={name: number for name, number in ids.items() if number is not None},
        adds_bos=bool(before),
        adds_eos=bool(after),
        chat_template=_template_of(tokenizer),
    )


def _template_of(tokenizer: Any) -> str | None:
    found = getattr(tokenizer, "chat_template", None)
    return found if isinstance(found, str) else None

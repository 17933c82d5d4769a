"""Texts that a language model writes: greedily, by beams or by chance, one row or many at once.

What is written for a row depends on that row alone, up to rounding: rows of a batch are padded on
the left for decoders and on the right for encoders, padding is masked, and positions are counted
without it. Sampling draws by the Gumbel-max trick (the largest of log-probabilities plus noise),
the noise from a generator of each row's own, which starts from the seed and the row's id.

Of the model's generation_config.json only what its tokens mean is kept, such as the first token of
a decoder. How to search is what the configuration of lora-cli says.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig as Search
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lora_cli.config.generation import GenerationConfig
from lora_cli.lora.prefix import Prefix
from lora_cli.models.architecture import token_positions
from lora_cli.models.base import silence
from lora_cli.tasks.streaming import stream_to

# What fills up rows of generated tokens that are kept in one tensor.
NO_TOKEN = -1
# What the model's own configuration says of its tokens.
_OF_THE_MODEL = (
    "bos_token_id",
    "pad_token_id",
    "decoder_start_token_id",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "bad_words_ids",
    "suppress_tokens",
    "begin_suppress_tokens",
)


def generate(
    model: Callable[..., Any],
    tokenizer: Any,
    input_ids: Sequence[Sequence[int]],
    config: GenerationConfig,
    *,
    ids: Sequence[str],
    options: Mapping[str, Any] | None = None,
    on_text: Callable[[str], None] | None = None,
    more: Callable[[Sequence[int]], Mapping[str, torch.Tensor]] = lambda _: {},
) -> list[list[int]]:
    """Continue rows of tokens, or, by an encoder-decoder, answer them.

    A row that the model has too few positions for is continued up to the last of them.

    Args:
        model: A model of transformers with a language modelling head, perhaps with adapters.
        tokenizer: Its tokenizer.
        input_ids: The tokens of each row, one at least, without padding.
        config: How to write.
        ids: The id of each row.
        options: What else is to be set of transformers' GenerationConfig, such as
            `forced_bos_token_id`; `eos_token_id` lists tokens that end a text besides those of the
            model and the tokenizer.
        on_text: Told of each piece of the text as it comes, for one row and without beams.
        more: Returns what else the model is given for the rows at some places, such as images.

    Returns:
        The new tokens of each row; the last is the one that ended it, if any did.
    """
    plain = unwrapped(model)
    settings = dict(options or {})
    ends = ending_ids(plain, tokenizer, settings.pop("eos_token_id", ()))
    search = search_settings(plain, tokenizer, config, ends=ends, options=settings)
    streamer = stream_to(on_text, lambda row: text_of(tokenizer, row, config), config.stop)
    found: list[list[int]] = [[] for _ in input_ids]
    for room, places in _by_room(plain, input_ids, config).items():
        rows = [input_ids[place] for place in places]
        processors = draws(config, [ids[place] for place in places])
        search.max_new_tokens = room
        with writing(plain, search):
            written = _run(plain, tokenizer, rows, config, processors, streamer, more(places))
        for place, row in zip(places, written, strict=True):
            found[place] = until_end(row, tokenizer, ends=ends, stop=config.stop)
    return found


def ending_ids(model: Any, tokenizer: Any, more: Sequence[int] = ()) -> frozenset[int]:
    """Return the tokens that end a text: those of the model, of its tokenizer, and `more`."""
    own = model.generation_config.eos_token_id
    listed = own if isinstance(own, list) else [own]
    found = (*listed, tokenizer.eos_token_id, *more)
    return frozenset(int(token) for token in found if token is not None)


def have_ended(
    model: Callable[..., Any],
    tokenizer: Any,
    written: Sequence[Sequence[int]],
    config: GenerationConfig,
    *,
    end_ids: Sequence[int] = (),
) -> list[bool]:
    """Return of each text that `generate` wrote whether it ended by itself, not at the limit."""
    ends = ending_ids(unwrapped(model), tokenizer, end_ids)
    return [
        bool(row)
        and (row[-1] in ends or bool(config.stop and _holds_text(row, tokenizer, config.stop)))
        for row in written
    ]


def text_of(tokenizer: Any, tokens: Sequence[int], config: GenerationConfig) -> str:
    """Return generated tokens as a text, up to the first of the texts that end it."""
    text: str = tokenizer.decode(list(tokens), skip_special_tokens=True)
    for stop in config.stop:
        text = text.partition(stop)[0]
    return text.strip()


def as_tensor(rows: Sequence[Sequence[int]], *, device: torch.device) -> torch.Tensor:
    """Return rows of tokens as one tensor (B, G), filled up with `NO_TOKEN`."""
    width = max(map(len, rows), default=0)
    full = [[*row, *[NO_TOKEN] * (width - len(row))] for row in rows]
    return torch.tensor(full, dtype=torch.long, device=device).view(len(rows), width)


def as_rows(tokens_BG: torch.Tensor) -> list[list[int]]:
    """Undo `as_tensor`."""
    return [[token for token in row if token != NO_TOKEN] for row in tokens_BG.tolist()]


def can_generate(model: Any) -> bool:
    """Whether a model can write, which an exported one cannot."""
    return hasattr(unwrapped(model), "generate")


def pad_left(
    rows: Sequence[Sequence[int]], *, padding: int, device: torch.device
) -> dict[str, torch.Tensor]:
    """Return `input_ids`, `attention_mask` and `position_ids` for a decoder, each (B, T)."""
    width = max(map(len, rows))
    missing = [width - len(row) for row in rows]
    pairs = list(zip(rows, missing, strict=True))
    found = {
        "input_ids": [[*[padding] * m, *row] for row, m in pairs],
        "attention_mask": [[0] * m + [1] * len(row) for row, m in pairs],
        "position_ids": [[0] * m + list(range(len(row))) for row, m in pairs],
    }
    return {name: torch.tensor(values, device=device) for name, values in found.items()}


def unwrapped(model: Any) -> Any:
    """Return a model without what it is wrapped in for several processes."""
    while not hasattr(model, "generate") and isinstance(getattr(model, "module", None), nn.Module):
        model = model.module
    return model


def search_settings(
    model: Any,
    tokenizer: Any,
    config: GenerationConfig,
    *,
    ends: frozenset[int],
    options: Mapping[str, Any],
) -> Search:
    """Return how transformers is to search; arguments as of `generate`, `ends` all end tokens."""
    own = {name: getattr(model.generation_config, name) for name in _OF_THE_MODEL}
    if own["pad_token_id"] is None:
        own["pad_token_id"] = tokenizer.pad_token_id
    beams = {}
    if config.num_beams > 1:
        beams = {"length_penalty": config.length_penalty, "early_stopping": False}
    return Search(
        **{**own, **options},
        eos_token_id=sorted(ends) or None,
        do_sample=False,
        num_beams=config.num_beams,
        repetition_penalty=config.repetition_penalty,
        no_repeat_ngram_size=config.no_repeat_ngram_size,
        use_cache=True,
        **beams,
    )


def _by_room(
    model: Any, input_ids: Sequence[Sequence[int]], config: GenerationConfig
) -> dict[int, list[int]]:
    """Return the places of the rows by the number of tokens that may be written for them."""
    most, positions = config.max_new_tokens, decoder_room(model)
    if positions is None:
        return {most: list(range(len(input_ids)))}
    rooms: dict[int, list[int]] = {}
    for place, row in enumerate(input_ids):
        # The last token that is written is not read.
        before = 0 if model.config.is_encoder_decoder else len(row) - 1
        rooms.setdefault(max(0, min(most, positions - before)), []).append(place)
    if hasattr(model, "set_reshard_after_forward"):
        # Processes that share a base generate once for each batch, all of them.
        return {max(1, min(rooms)): list(range(len(input_ids)))}
    rooms.pop(0, None)
    return rooms


def decoder_room(model: Any) -> int | None:
    """Return how many tokens a decoder can look at; None where there is no limit."""
    positions = token_positions(model.config.get_text_config(decoder=True))
    if positions is None:
        return None
    prefixes = [module for module in model.modules() if isinstance(module, Prefix)]
    return positions - sum(prefix.size.num_tokens for prefix in prefixes)


@contextmanager
def writing(model: Any, search: Search) -> Iterator[None]:
    """Put a model into the state to generate in: nothing of its own search settings is left."""
    own, training = model.generation_config, [m for m in model.modules() if m.training]
    model.generation_config = search
    model.eval()
    try:
        with torch.no_grad(), silence():
            yield
    finally:
        model.generation_config = own
        for module in training:
            module.training = True


def _run(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Sequence[int]],
    config: GenerationConfig,
    processors: LogitsProcessorList,
    streamer: Any,
    more: Mapping[str, torch.Tensor],
) -> list[list[int]]:
    """Return what was written for each row, with whatever follows its end."""
    search, device = model.generation_config, model.device
    if model.config.is_encoder_decoder:
        inputs, start = _pad_right(rows, padding=search.pad_token_id or 0, device=device), 1
    else:
        inputs = pad_left(rows, padding=search.pad_token_id or 0, device=device)
        # It counts positions itself, by the mask.
        del inputs["position_ids"]
        start = inputs["input_ids"].shape[1]
    written = model.generate(
        **inputs,
        **more,
        generation_config=search,
        logits_processor=processors,
        stopping_criteria=stops_at(tokenizer, config.stop, start),
        streamer=streamer,
    )
    tokens: list[list[int]] = written[:, start:].tolist()
    return tokens


def _pad_right(
    rows: Sequence[Sequence[int]], *, padding: int, device: torch.device
) -> dict[str, torch.Tensor]:
    width = max(map(len, rows))
    found = {
        "input_ids": [[*row, *[padding] * (width - len(row))] for row in rows],
        "attention_mask": [[1] * len(row) + [0] * (width - len(row)) for row in rows],
    }
    return {name: torch.tensor(values, device=device) for name, values in found.items()}


def until_end(
    tokens: Sequence[int], tokenizer: Any, *, ends: frozenset[int], stop: Sequence[str]
) -> list[int]:
    """Return the tokens up to the one that ended the text."""
    for place, token in enumerate(tokens):
        kept = list(tokens[: place + 1])
        if token in ends or (stop and _holds_text(kept, tokenizer, stop)):
            return kept
    return list(tokens)


def _holds_text(tokens: Sequence[int], tokenizer: Any, texts: Sequence[str]) -> bool:
    """Whether one of some texts is at the end of tokens; a character has four tokens at most."""
    last = tokens[-4 * max(map(len, texts)) - 4 :]
    written = tokenizer.decode(list(last), skip_special_tokens=False)
    return any(text in written for text in texts)


def draws(config: GenerationConfig, ids: Sequence[str]) -> LogitsProcessorList:
    """Return what changes logits so that the largest is a draw; nothing without sampling."""
    if not config.do_sample:
        return LogitsProcessorList([])
    found: list[LogitsProcessor] = [TemperatureLogitsWarper(config.temperature)]
    if config.top_k:
        found.append(TopKLogitsWarper(config.top_k))
    if config.top_p < 1:
        found.append(TopPLogitsWarper(config.top_p))
    return LogitsProcessorList([*found, _Noise([f"{config.seed}/{one}" for one in ids])])


class _Noise(LogitsProcessor):
    """Adds Gumbel noise to the logits of each row, from a generator of its own."""

    def __init__(self, keys: Sequence[str]) -> None:
        digests = [hashlib.sha256(key.encode()).digest() for key in keys]
        self._generators = [
            torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
            for digest in digests
        ]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        del input_ids
        noise = torch.stack(
            [torch.empty(scores.shape[1]).exponential_(generator=g) for g in self._generators]
        )
        # The logarithm of zero would undo the -inf of tokens that are ruled out.
        return scores - noise.clamp_min(torch.finfo(noise.dtype).tiny).log().to(scores)


def stops_at(tokenizer: Any, texts: Sequence[str], start: int) -> StoppingCriteriaList:
    """Return what ends rows at texts that they hold behind their first `start` tokens."""
    return StoppingCriteriaList([_StopAtTexts(tokenizer, texts, start)] if texts else [])


class _StopAtTexts(StoppingCriteria):
    """Ends a row at a text that it holds behind its first `start` tokens."""

    def __init__(self, tokenizer: Any, texts: Sequence[str], start: int) -> None:
        self._tokenizer, self._texts, self._start = tokenizer, texts, start

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> Any:
        del scores
        rows = input_ids[:, self._start :].tolist()
        found = [_holds_text(row, self._tokenizer, self._texts) for row in rows]
        return torch.tensor(found, dtype=torch.bool, device=input_ids.device)

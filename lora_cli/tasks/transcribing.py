"""Texts that a model such as Whisper writes for sounds, by the same settings as any other text."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import GenerationMixin

from lora_cli.config.generation import GenerationConfig
from lora_cli.tasks.generation import (
    decoder_room,
    draws,
    ending_ids,
    search_settings,
    stops_at,
    until_end,
    unwrapped,
    writing,
)


def transcribe(
    model: Callable[..., Any],
    tokenizer: Any,
    inputs: Mapping[str, Any],
    config: GenerationConfig,
    *,
    ids: Sequence[str],
    prompt: Sequence[int],
) -> list[list[int]]:
    """Write what is said in sounds.

    Whisper's own way to generate would detect a language, follow moments and try again at other
    temperatures; here the prompt is fixed, and the search is that of any encoder-decoder.

    Args:
        model: A model with Whisper's decoder, perhaps with adapters.
        tokenizer: Its tokenizer.
        inputs: ``input_features`` (B, M, F), or ``encoder_outputs`` as the model gives them.
        config: How to write.
        ids: The id of each row.
        prompt: The tokens that the decoder is given.

    Returns:
        The new tokens of each row; the last is the one that ended it, if any did.
    """
    plain = unwrapped(model)
    ends, start = ending_ids(plain, tokenizer), len(prompt)
    search = search_settings(plain, tokenizer, config, ends=ends, options={})
    # The last token that is written is not read.
    room = (decoder_room(plain) or config.max_new_tokens) - start + 1
    search.max_new_tokens = max(1, min(config.max_new_tokens, room))
    begun_BP = torch.tensor([list(prompt)] * len(ids), device=plain.device)
    with writing(plain, search):
        written = GenerationMixin.generate(
            plain,
            **inputs,
            decoder_input_ids=begun_BP,
            generation_config=search,
            logits_processor=draws(config, ids),
            stopping_criteria=stops_at(tokenizer, config.stop, start),
        )
    return [
        until_end(row, tokenizer, ends=ends, stop=config.stop)
        for row in written[:, start:].tolist()
    ]

"""Long contexts in windows that overlap, each with a question, and answers in these.

A window is a dict of plain values: ``inputs``, what a tokenizer returns; ``places``, where the
tokens of the context are in it; ``spans``, where these are in the context, in characters; ``none``,
the place that stands for having no answer; ``first``, the number of its first token of the context.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional

from lora_cli.data.answers import Answer
from lora_cli.errors import Problem, UserError

Window = dict[str, Any]


class WindowReader:
    """Cuts contexts into windows.

    Args:
        tokenizer: One that tells where a token is in its text.
        max_length: Tokens of a window. The question has at most half of those that are not special.
        stride: Tokens of the context that a window shares with the next; None takes a third of
            `max_length`.

    Raises:
        UserError: If the tokenizer cannot tell, or no window would go on behind the one before.
    """

    def __init__(self, tokenizer: Any, *, max_length: int, stride: int | None) -> None:
        _check_tokenizer(tokenizer)
        self._tokenizer, self._max_length = tokenizer, max_length
        room = max_length - tokenizer.num_special_tokens_to_add(pair=True)
        self._max_question = room // 2
        self._stride = max_length // 3 if stride is None else stride
        _check_stride(self._stride, below=room - self._max_question)

    def read(self, question: str, context: str) -> tuple[list[Window], int]:
        """Return the windows, one at least, and the number of tokens cut from the question."""
        whole = self._tokenizer(question, context, return_offsets_mapping=True)
        owners, spans = whole.sequence_ids(), whole["offset_mapping"]
        asked = [place for place, owner in enumerate(owners) if owner == 0]
        told = [place for place, owner in enumerate(owners) if owner == 1]
        cut = set(asked[self._max_question :])
        frame = [n for n, owner in enumerate(owners) if owner != 1 and n not in cut]
        size = self._max_length - len(frame)
        windows = []
        # The last begins no later than where the one before would leave tokens out.
        for first in range(0, max(1, len(told) - self._stride), size - self._stride):
            kept = sorted([*frame, *told[first : first + size]])
            places = [n for n, place in enumerate(kept) if owners[place] == 1]
            inputs = {
                name: [values[place] for place in kept]
                for name, values in whole.items()
                if name != "offset_mapping"
            }
            windows.append(
                {
                    "inputs": inputs,
                    "places": places,
                    "spans": [list(spans[kept[n]]) for n in places],
                    "none": self._none_place(inputs["input_ids"]),
                    "first": first,
                }
            )
        return windows, len(cut)

    def _none_place(self, ids: Sequence[int]) -> int:
        cls = self._tokenizer.cls_token_id
        return ids.index(cls) if cls in ids else 0


def find_answer(
    windows: Sequence[Window], answer: Answer | None
) -> list[tuple[int | None, int | None]]:
    """Return the places of the first and the last token of an answer in each window.

    They are those of having none where a window has not the whole answer. An answer that is whole
    in no window has in each the places that are there, None for the others.
    """
    nowhere = [(window["none"], window["none"]) for window in windows]
    if answer is None:
        return nowhere
    text, begin = answer
    end = begin + len(text)
    # By the number of the token in the context; windows overlap.
    spans = {
        window["first"] + n: span for window in windows for n, span in enumerate(window["spans"])
    }
    inside = [n for n, span in spans.items() if span[1] > begin and span[0] < end]
    if not inside:
        return [(None, None) for _ in windows]
    first, last = min(inside), max(inside)
    found = [(_place_of(window, first), _place_of(window, last)) for window in windows]
    if not any(None not in places for places in found):
        return found
    return [none if None in places else places for places, none in zip(found, nowhere, strict=True)]


def _place_of(window: Window, token: int) -> int | None:
    n = token - window["first"]
    return window["places"][n] if 0 <= n < len(window["places"]) else None


def best_spans(
    start_C: torch.Tensor, end_C: torch.Tensor, *, max_length: int, count: int
) -> list[tuple[int, int, float]]:
    """Return (first token, last token, score) of the best answers, best first.

    Args:
        start_C: Scores of the tokens as the first of an answer.
        end_C: Scores as the last; that of an answer is the sum of both.
        max_length: Tokens of an answer at most.
        count: Answers to return at most.
    """
    most = min(max_length, len(start_C))
    if not most:
        return []
    padded = functional.pad(end_C, (0, most - 1), value=-torch.inf)
    # Of every first token, those that can be the last, by their distance.
    score_CL = start_C.unsqueeze(1) + padded.unfold(0, most, 1)
    scores, indices = score_CL.flatten().topk(min(count, score_CL.numel()))
    return [
        (index // most, index // most + index % most, score)
        for score, index in zip(scores.tolist(), indices.tolist(), strict=True)
        if score > -torch.inf
    ]


def trim(text: str, begin: int, end: int) -> tuple[int, int]:
    """Return a part of a text without the white space at its ends.

    >>> trim("in Paris ", 2, 9)
    (3, 8)
    """
    part = text[begin:end]
    return begin + len(part) - len(part.lstrip()), begin + len(part.rstrip())


def _check_tokenizer(tokenizer: Any) -> None:
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(
            Problem(
                id="task.slow-tokenizer",
                message="The tokenizer must tell where each token is in its text, but "
                f"{type(tokenizer).__name__} does not.",
                fix="use a model that has a tokenizer.json",
            )
        )


def _check_stride(stride: int, *, below: int) -> None:
    if stride >= below:
        raise UserError(
            Problem(
                id="task.stride",
                message=f"`task.stride` must be less than {below}, the tokens of the context that "
                f"task.max_length leaves beside the longest question, but is {stride}.",
                key="task.stride",
                allowed=f"0 to {below - 1}, or null",
                fix="leave it out, or raise task.max_length",
            )
        )

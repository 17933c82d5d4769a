"""Speech for models that read windows of a fixed length: one, or several that overlap.

A sound that is longer than a window is read in windows that share a third of it with the next, and
the texts are joined where their tokens agree.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from difflib import SequenceMatcher
from typing import Any

import torch

from lora_cli.data.media import read_place
from lora_cli.data.sounds import Wave, read_sound
from lora_cli.tasks.audio import AudioReader
from lora_cli.tasks.contract import Batch, Features
from lora_cli.tasks.media import like_model
from lora_cli.tasks.speech import Span, chunk_spans

# Of a window, at each side of what is only its own.
_SHARED_SIDE = 6
# Words are not spoken evenly: so much more of a text than of its sound may be shared.
_SLACK = 1.5
# Tokens in a row that two texts must have in common to be joined there.
_LEAST = 2


class WindowReader(AudioReader):
    """Reads speech whole, for a model with a window.

    Args:
        processor: The feature extractor of the model.
        state: What the task learned.
        augmentation: What is changed in training.
    """

    def __init__(self, processor: Any, state: Mapping[str, Any], *, augmentation: Any) -> None:
        super().__init__(processor, {**state, "seconds": math.inf}, augmentation=augmentation)
        self._most = math.inf
        self._size = round(self._window * self._rate)

    def describe(self, content: bytes) -> Features:
        """Return what the report tells of a sound, and whether it `fits` into one window."""
        found = super().describe(content)
        fits = found["length"] <= self._size
        found["kinds"]["length"] = "one window" if fits else f"longer than {self._window:g} s"
        return {**found, "fits": fits}

    def windows(
        self, place: Mapping[str, Any], model: Callable[..., Any], *, most: int
    ) -> tuple[list[Span], Iterator[Mapping[str, torch.Tensor]]]:
        """Return the windows of a sound, as `chunk_spans` does, and their inputs, so many at once.

        Args:
            place: Of the sound.
            model: Where the inputs are to be.
            most: Windows in one batch.
        """
        wave: Wave = self._fit(*read_sound(read_place(place)), place=0.0)
        spans = chunk_spans(len(wave), chunk=self._size, stride=self._size // _SHARED_SIDE)
        return spans, self._batches(wave, spans, model, most)

    def _batches(
        self, wave: Wave, spans: Sequence[Span], model: Callable[..., Any], most: int
    ) -> Iterator[Mapping[str, torch.Tensor]]:
        for first in range(0, len(spans), most):
            cut = [wave[start:end] for start, end, *_ in spans[first : first + most]]
            found = self._processor(cut, sampling_rate=self._rate, return_tensors="pt")
            yield like_model(dict(found), model)

    def first_windows(
        self, batch: Batch, rows: Sequence[int], model: Callable[..., Any]
    ) -> Mapping[str, torch.Tensor]:
        """Return the inputs of the first window of some rows, changed at random in training."""
        chosen: Batch = {name: [batch[name][row] for row in rows] for name in ("places", "ids")}
        return self.inputs({**chosen, "seed": batch.get("seed")}, model)


def join_windows(texts: Sequence[Sequence[int]], spans: Sequence[Span]) -> list[int]:
    """Return the tokens of a long sound from those of its windows.

    Two neighbours are joined in the middle of their longest run of common tokens, among those that
    may be of what both heard; without such a run one is put behind the other.

    >>> join_windows([[1, 2, 3, 4, 5], [9, 4, 5, 6, 7]], [(0, 6, 0, 5), (3, 9, 5, 9)])
    [1, 2, 3, 4, 5, 6, 7]
    >>> join_windows([[1, 2], [3, 4]], [(0, 6, 0, 5), (4, 10, 5, 10)])
    [1, 2, 3, 4]
    """
    found = list(texts[0])
    for number in range(1, len(texts)):
        (before, until, *_), (start, end, *_) = spans[number - 1 : number + 1]
        right, shared = list(texts[number]), _SLACK * (until - start)
        reach = min(
            len(found), math.ceil(len(texts[number - 1]) * min(1, shared / (until - before)))
        )
        tail = found[len(found) - reach :]
        head = right[: math.ceil(len(right) * min(1, shared / (end - start)))]
        run = SequenceMatcher(None, tail, head, autojunk=False).find_longest_match()
        if run.size < min(_LEAST, len(tail), len(head)) or not run.size:
            found += right
        else:
            found = found[: len(found) - reach + run.a + run.size] + right[run.b + run.size :]
    return found

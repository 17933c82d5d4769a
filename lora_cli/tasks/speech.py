"""Speech as input: whole, or in chunks that overlap where it is longer than a model should read.

A chunk has ``chunk`` seconds, and shares ``stride`` seconds with the next one at either side of
what is used of it. Of each chunk the frames in its middle are kept, so that every frame of a long
sound is there once, and was computed with at least ``stride`` seconds around it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from lora_cli.data.media import read_place
from lora_cli.data.sounds import Wave, read_sound
from lora_cli.models.time_masks import seeded_masks
from lora_cli.tasks.audio import AudioReader
from lora_cli.tasks.contract import Batch
from lora_cli.tasks.media import like_model

Span = tuple[int, int, int, int]

# Chunks that are run together, at most.
_TOGETHER = 8
# What a model of transformers counts the frames of samples with.
_COUNT = "_get_feat_extract_output_lengths"


def chunk_spans(samples: int, *, chunk: int, stride: int) -> list[Span]:
    """Return the chunks of a sound: first and last sample, and those between which it is used.

    >>> chunk_spans(10, chunk=10, stride=2)
    [(0, 10, 0, 10)]
    >>> chunk_spans(20, chunk=10, stride=2)
    [(0, 10, 0, 8), (6, 16, 8, 14), (12, 20, 14, 20)]
    """
    if samples <= chunk:
        return [(0, samples, 0, samples)]
    spans, step, start = [], chunk - 2 * stride, 0
    while start + chunk < samples:
        spans.append((start, start + chunk, start + stride if start else 0, start + step + stride))
        start += step
    return [*spans, (start, samples, start + stride, samples)]


class SpeechReader(AudioReader):
    """Reads speech for models that say something at each moment.

    Args:
        processor: The feature extractor of the model.
        state: What the task learned; sounds are never cut.
        augmentation: What is changed in training.
        chunk: Seconds of a chunk.
        stride: Seconds that it shares at each side.
    """

    def __init__(
        self,
        processor: Any,
        state: Mapping[str, Any],
        *,
        augmentation: Any,
        chunk: int,
        stride: int,
    ) -> None:
        super().__init__(processor, {**state, "seconds": float("inf")}, augmentation=augmentation)
        self._chunk, self._stride = chunk * self._rate, stride * self._rate

    @property
    def rate(self) -> int:
        """Samples of a second, as the model reads them."""
        return self._rate

    def logits(self, batch: Batch, model: Callable[..., Any]) -> list[torch.Tensor]:
        """Return what a model says at each moment of each row: float32 of shape (F, V) a row."""
        seed, waves = batch.get("seed"), []
        for place, row_id in zip(batch["places"], batch["ids"], strict=True):
            samples = self._fit(*read_sound(read_place(place)), place=0.0)
            waves.append(samples if seed is None else self._changed(samples, row_id, seed))
        units = [
            (row, span)
            for row, wave in enumerate(waves)
            for span in chunk_spans(len(wave), chunk=self._chunk, stride=self._stride)
        ]
        found: dict[tuple[int, int], torch.Tensor] = {}
        for part in self._parts(units, model):
            cut = [waves[row][start:end] for row, (start, end, *_) in part]
            ids = [batch["ids"][row] for row, _ in part]
            for (row, span), frames in zip(part, self._run(model, cut, ids, seed), strict=True):
                found[row, span[0]] = _used(frames, span, model)
        return [
            torch.cat([found[key] for key in sorted(found) if key[0] == row])
            for row in range(len(waves))
        ]

    def _parts(
        self, units: Sequence[tuple[int, Span]], model: Callable[..., Any]
    ) -> Iterator[list[tuple[int, Span]]]:
        """Yield the chunks that are run together.

        They are of one length where padding cannot be masked, or where the model, such as an ONNX
        session, does not say which frames are of it.
        """
        lengths = [end - start for _, (start, end, *_) in units]
        pads = self._processor.return_attention_mask and hasattr(model, _COUNT)
        for length in [None] if pads else sorted(set(lengths)):
            chosen = [
                unit for unit, own in zip(units, lengths, strict=True) if length in (None, own)
            ]
            for first in range(0, len(chosen), _TOGETHER):
                yield chosen[first : first + _TOGETHER]

    def _run(
        self, model: Callable[..., Any], waves: Sequence[Wave], ids: Sequence[str], seed: int | None
    ) -> list[torch.Tensor]:
        """Return the frames of each wave, without those of padding."""
        inputs = like_model(
            dict(
                self._processor(
                    list(waves), sampling_rate=self._rate, return_tensors="pt", padding=True
                )
            ),
            model,
        )
        longest = max(map(len, waves))
        with seeded_masks(model, seed=seed, ids=ids, samples=longest):
            logits_BFV = model(**inputs).logits.float()
        if all(len(wave) == longest for wave in waves):
            return list(logits_BFV)
        frames = getattr(model, _COUNT)(torch.tensor([len(wave) for wave in waves]))
        return [row[:size] for row, size in zip(logits_BFV, frames.tolist(), strict=True)]


def _used(frames: torch.Tensor, span: Span, model: Any) -> torch.Tensor:
    """Return the frames of a chunk that are used of it."""
    start, end, first, last = span
    stride = getattr(getattr(model, "config", None), "inputs_to_logits_ratio", None)
    # A model without settings: its last frame needs more samples than one stride.
    stride = stride or (end - start) // (len(frames) + 1)
    begin = (first - start) // stride
    return frames[begin:] if last == end else frames[begin : (last - start) // stride]


def pad_frames(rows: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return frames of rows as one tensor (B, F, V), and how many each row has."""
    counts = torch.tensor([len(row) for row in rows])
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True), counts


def best_path(frames: torch.Tensor) -> list[int]:
    """Return the best number at each moment, of shape (F, V)."""
    found: list[int] = np.asarray(frames.argmax(-1).cpu()).tolist()
    return found

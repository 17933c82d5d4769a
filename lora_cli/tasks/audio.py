"""Sounds as inputs of a row.

A sound is decoded, its channels averaged, cut to the seconds that the task reads and brought to
the rate of the model. What the model reads of it is made by its feature extractor, and depends on
the row alone, not on its batch: some extractors fill every row to one window, some mask what they
fill, and rows of models that can do neither (those with a group norm, such as wav2vec2-base) are
run with rows of exactly their length.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from lora_cli.config.audio import SoundAugmentationConfig
from lora_cli.data import made_up
from lora_cli.data.media import MediaError, Place, locate, read_place
from lora_cli.data.sound_augmentation import SoundAugmentation, augment_sound, draw_place
from lora_cli.data.sounds import (
    Wave,
    count_seconds,
    cut_sound,
    describe_sound,
    read_sound,
    resample,
)
from lora_cli.data.types import Row
from lora_cli.models.sound_windows import cut_model, cut_processor, window_seconds
from lora_cli.tasks.contract import Batch, Features
from lora_cli.tasks.media import MediaFamily, MediaReader
from lora_cli.tasks.rows import Role, RowFamily

AUDIO = Role(
    "audio",
    (
        *("audio", "sound", "speech", "audio_path", "audio_file", "audio_filepath", "wav"),
        *("file_name", "filename", "file", "path"),
    ),
    made_up=made_up.sound,
)

# What is read of a sound where nothing else is said, as long as train has such.
_MOST_SECONDS = 30
# A sound shorter than what a layer of convolutions looks at has no frame at all.
_LEAST_SECONDS = 0.1


class AudioFamily(MediaFamily, RowFamily):
    """Rows with a sound; the state holds ``seconds``, to which longer ones are cut."""

    kind, module, extra = "audio", "soundfile", "audio"
    processor = "feature extractor"
    inputs = (AUDIO,)

    def learn_used(
        self, config: Any, train: Sequence[Row], state: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return ``seconds``: as set, or the longest of train, up to a whole number, at most 30."""
        found = super().learn_used(config, train, state)
        seconds = config.max_seconds
        if seconds is None:
            longest = longest_seconds(train, state["columns"][self.kind] or "")
            seconds = min(max(1, math.ceil(longest)), _MOST_SECONDS)
        return {**found, "seconds": seconds}

    def fit_model(self, model: nn.Module, state: Mapping[str, Any]) -> None:
        """Cut the window of a model that always reads the same number of seconds."""
        cut_model(model, state["seconds"])

    def fit_processor(self, processor: Any, state: Mapping[str, Any]) -> Any:
        """Cut the window of its feature extractor."""
        cut_processor(processor, state["seconds"])
        return processor


def longest_seconds(rows: Sequence[Row], column: str) -> float:
    """Return the length of the longest sound, as the headers tell; broken ones have none."""
    longest = 0.0
    for row in rows:
        try:
            content = read_place(locate(row.values.get(column), row.source))
        except MediaError:
            # It is reported with the others, when rows are encoded.
            continue
        longest = max(longest, count_seconds(content))
    return longest


class AudioReader(MediaReader):
    """Reads sounds, cut and changed at random in training, as the model takes them.

    Args:
        processor: The feature extractor of the model.
        state: What the task learned.
        augmentation: What is changed in training.
    """

    kind = "audio"

    def __init__(
        self, processor: Any, state: Mapping[str, Any], *, augmentation: SoundAugmentationConfig
    ) -> None:
        super().__init__(processor, state["columns"])
        self._rate: int = processor.sampling_rate
        self._window = window_seconds(processor)
        self._most = min(float(state["seconds"]), self._window)
        self._augmentation = SoundAugmentation(
            gain=augmentation.gain, noise=augmentation.noise, noise_snr=augmentation.noise_snr
        )

    def describe(self, content: bytes) -> Features:
        """Return seconds, rate, channels and format of a sound, and its samples for the model."""
        found = describe_sound(content)
        seconds = found["measures"]["seconds"]
        found["kinds"]["length"] = "whole" if seconds <= self._most else f"cut to {self._most:g} s"
        found["length"] = len(self._fit(*read_sound(content), place=0.0))
        return found

    def collate(self, features: Sequence[Features]) -> Batch:
        """Put places and lengths together."""
        return {**super().collate(features), "lengths": [row["length"] for row in features]}

    def parts(
        self, batch: Batch, model: Callable[..., Any]
    ) -> Iterator[tuple[list[int], Mapping[str, torch.Tensor]]]:
        """Yield the rows of a batch that are run together, by their places, and their inputs."""
        lengths: Sequence[int] = batch["lengths"]
        fills = math.isfinite(self._window) or self._processor.return_attention_mask
        for length in sorted(set(lengths)) if not fills else [None]:
            rows = [row for row, own in enumerate(lengths) if length in (None, own)]
            part = {name: [batch[name][row] for row in rows] for name in ("places", "ids")}
            yield rows, self.inputs({**part, "seed": batch.get("seed")}, model)

    def process(
        self, places: Sequence[Place], ids: Sequence[str], *, seed: int | None
    ) -> Mapping[str, torch.Tensor]:
        """Return what the feature extractor makes of sounds, rows first."""
        waves = [self._wave(place, row_id, seed) for place, row_id in zip(places, ids, strict=True)]
        settings = {} if math.isfinite(self._window) else {"padding": True}
        found: Mapping[str, torch.Tensor] = self._processor(
            waves, sampling_rate=self._rate, return_tensors="pt", **settings
        )
        return dict(found)

    def _wave(self, place: Place, row_id: str, seed: int | None) -> Wave:
        where = 0.5 if seed is None else draw_place(seed=seed, row_id=row_id)
        samples = self._fit(*read_sound(read_place(place)), place=where)
        return samples if seed is None else self._changed(samples, row_id, seed)

    def _changed(self, samples: Wave, row_id: str, seed: int) -> Wave:
        return augment_sound(samples, self._augmentation, seed=seed, row_id=row_id)

    def _fit(self, samples: Wave, rate: int, *, place: float) -> Wave:
        """Cut a sound, bring it to the rate of the model, and add silence to a very short one."""
        if math.isfinite(self._most):
            samples = cut_sound(samples, math.ceil(self._most * rate), place=place)
        found = resample(samples, rate, self._rate)
        if math.isfinite(self._most):
            found = found[: math.ceil(self._most * self._rate)]
        least = math.ceil(_LEAST_SECONDS * self._rate)
        return np.pad(found, (0, max(0, least - len(found)))).astype(np.float32)

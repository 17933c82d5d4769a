"""Long speech in chunks: every frame once, and as without chunks where a model is local."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tiny_sounds import tone, wav

from lora_cli.config.audio import SoundAugmentationConfig
from lora_cli.tasks.speech import SpeechReader, best_path, chunk_spans, pad_frames

STRIDE, WIDTH = 320, 400


class Local:
    """A model that looks at 25 ms every 20 ms, as the convolutions of wav2vec 2.0 do."""

    config = SimpleNamespace(inputs_to_logits_ratio=STRIDE)

    def __call__(self, input_values: torch.Tensor) -> Any:
        frames = input_values.unfold(1, WIDTH, STRIDE)
        return SimpleNamespace(logits=torch.stack([frames.mean(-1), frames.std(-1)], -1))


@pytest.mark.parametrize("samples", [5, 10, 11, 16, 17, 40])
def test_every_sample_is_used_once_with_its_surroundings(samples: int) -> None:
    spans = chunk_spans(samples, chunk=10, stride=2)
    used = [place for _, _, first, last in spans for place in range(first, last)]
    assert used == list(range(samples))
    for start, end, first, last in spans:
        assert end - start <= 10
        assert start == 0 or first - start == 2
        assert end == samples or end - last == 2


@pytest.mark.parametrize("seconds", [2.0, 6.3, 9.99, 23.5])
def test_chunks_say_what_the_whole_says(seconds: float, tmp_path: Path) -> None:
    path = tmp_path / "long.wav"
    path.write_bytes(wav(tone(300, seconds, rate=16000), rate=16000))
    extractor = transformers.Wav2Vec2FeatureExtractor(do_normalize=False)
    found = []
    for chunk in (100, 5):
        reader = SpeechReader(
            extractor,
            {"columns": {"audio": "audio"}},
            augmentation=SoundAugmentationConfig(),
            chunk=chunk,
            stride=1,
        )
        batch = {"places": [{"path": "x", "file": str(path)}], "ids": ["x"]}
        found.append(reader.logits(batch, Local())[0])
    assert len(found[0]) == (round(seconds * 16000) - WIDTH) // STRIDE + 1
    assert torch.allclose(found[0], found[1], atol=1e-6)


def test_a_model_that_does_not_count_its_frames_is_given_rows_of_one_length(
    tmp_path: Path,
) -> None:
    """An exported one; with guesses, frames of padding would be taken for those of a row."""

    def run(input_values: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        assert attention_mask.all()
        return Local()(input_values)

    places = []
    for number, seconds in enumerate((0.5, 0.731, 0.5)):
        path = tmp_path / f"{number}.wav"
        path.write_bytes(wav(tone(300, seconds, rate=16000), rate=16000))
        places.append({"path": path.name, "file": str(path)})
    reader = SpeechReader(
        transformers.Wav2Vec2FeatureExtractor(return_attention_mask=True),
        {"columns": {"audio": "audio"}},
        augmentation=SoundAugmentationConfig(),
        chunk=20,
        stride=2,
    )
    found = reader.logits({"places": places, "ids": ["a", "b", "c"]}, run)
    assert [len(row) for row in found] == [24, 36, 24]


def test_rows_are_padded_and_read() -> None:
    rows = [torch.eye(3)[[0, 2]], torch.eye(3)[[1, 1, 0]]]
    padded, counts = pad_frames(rows)
    assert padded.shape == (2, 3, 3)
    assert counts.tolist() == [2, 3]
    assert best_path(rows[1]) == [1, 1, 0]
    assert np.asarray(padded[0, 2]).sum() == 0

"""Long speech in windows: all of it is heard, and texts are joined where they agree."""

import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tiny_sounds import tone, wav

from lora_cli.config.audio import SoundAugmentationConfig
from lora_cli.tasks.speech import chunk_spans
from lora_cli.tasks.speech_windows import WindowReader, join_windows


def read(folder: Path, seconds: float) -> tuple[WindowReader, dict[str, Any], Path]:
    path = folder / "sound.wav"
    path.write_bytes(wav(tone(300, seconds, rate=16000), rate=16000))
    process = transformers.WhisperFeatureExtractor(feature_size=16, chunk_length=3)
    reader = WindowReader(
        process, {"columns": {"audio": "audio"}}, augmentation=SoundAugmentationConfig()
    )
    return reader, reader.describe(path.read_bytes()), path


@pytest.mark.parametrize(("seconds", "windows"), [(2.9, 1), (3.0, 1), (3.1, 2), (8.0, 4)])
def test_windows_hold_the_whole_sound(seconds: float, windows: int, tmp_path: Path) -> None:
    reader, found, path = read(tmp_path, seconds)
    assert found["fits"] == (windows == 1)
    assert found["length"] == round(16000 * seconds)
    assert found["kinds"]["length"] == ("one window" if windows == 1 else "longer than 3 s")
    spans, parts = reader.windows({"path": "x", "file": str(path)}, object, most=2)
    features = torch.cat([inputs["input_features"] for inputs in parts])
    assert features.shape == (windows, 16, 300)
    heard = np.zeros(round(16000 * seconds), int)
    for start, end, *_ in spans:
        heard[start:end] += 1
    assert heard.min() == 1
    for (_, until, *_), (start, *_) in pairwise(spans):
        assert until - start == 16000


@pytest.mark.parametrize("seed", range(20))
def test_what_was_heard_twice_is_written_once(seed: int) -> None:
    """Of tokens at even moments, all are found again, whatever a window says at its edges."""
    draw = random.Random(seed)
    count = draw.randint(31, 200)
    tokens = [draw.randint(0, 1000) for _ in range(count)]
    spans = chunk_spans(count, chunk=30, stride=5)
    texts = []
    for number, (start, end, *_) in enumerate(spans):
        text = tokens[start:end]
        # The word at the edge is heard in part.
        if number:
            text[0] = 2000
        if end < count:
            text[-1] = 3000
        texts.append(text)
    assert join_windows(texts, spans) == tokens


def test_texts_without_a_common_run_follow_each_other() -> None:
    spans = chunk_spans(50, chunk=30, stride=5)
    assert join_windows([[1, 2, 3], [4, 5, 3]], spans) == [1, 2, 3, 4, 5, 3]
    assert join_windows([[1, 2, 3], []], spans) == [1, 2, 3]
    assert join_windows([[], [1]], spans) == [1]
    # A run that only the first window can have heard is not looked at.
    early = [7, 8, *range(20)]
    assert join_windows([early, [7, 8, 30]], spans) == [*early, 7, 8, 30]

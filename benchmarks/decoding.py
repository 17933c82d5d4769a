"""What decoding a file costs beside training on it, in milliseconds of processor time, one thread.

    python benchmarks/decoding.py

Files are made up: photos of several sizes as JPEG, ten seconds of noise as FLAC and MP3. Models
have the sizes of DINOv2-small (at 224 pixels) and wav2vec2-base, and random weights; all of them
are trained, on a batch of eight images or on one sound.
"""

import time
from collections.abc import Callable
from io import BytesIO
from typing import Any

import numpy as np
import soundfile
import torch
import transformers
from PIL import Image

from lora_cli.data.images import read_image
from lora_cli.data.sounds import read_sound, resample

SIZES = ((32, 32), (640, 480), (1920, 1080), (4000, 3000))
RATE, READ, SECONDS = 44_100, 16_000, 10


def milliseconds(work: Callable[[], Any], times: int) -> float:
    """Return the processor time of one call, after one that is not counted."""
    work()
    start = time.process_time()
    for _ in range(times):
        work()
    return 1000 * (time.process_time() - start) / times


def photo(width: int, height: int) -> bytes:
    """Return a JPEG file of coloured clouds."""
    draw = np.random.default_rng(0)
    dots = draw.integers(0, 255, (max(1, height // 16), max(1, width // 16), 3), dtype=np.uint8)
    content = BytesIO()
    Image.fromarray(dots).resize((width, height)).save(content, "JPEG", quality=90)
    return content.getvalue()


def noise(kind: str) -> bytes:
    """Return a sound file of noise."""
    content = BytesIO()
    wave = np.random.default_rng(0).normal(0, 0.1, RATE * SECONDS)
    soundfile.write(content, wave, RATE, format=kind)
    return content.getvalue()


def training(model: Any, **inputs: torch.Tensor) -> Callable[[], None]:
    """Return a forward and a backward pass."""
    return lambda: model(**inputs).last_hidden_state.sum().backward()


def main() -> None:
    """Run as a script."""
    torch.set_num_threads(1)
    processor = transformers.BitImageProcessorPil(
        size={"shortest_edge": 256}, crop_size={"height": 224, "width": 224}
    )
    vision = transformers.Dinov2Model(
        transformers.Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=224)
    )
    print("| file | decoding, ms | training, ms |\n|---|---:|---:|")
    pixels = torch.zeros(8, 3, 224, 224)
    cost = milliseconds(training(vision, pixel_values=pixels), 2) / len(pixels)
    for width, height in SIZES:
        content = photo(width, height)
        read = milliseconds(lambda: processor(images=[read_image(content)]), 5)  # noqa: B023
        print(f"| JPEG, {width} x {height} | {read:.1f} | {cost:.0f} |")
    speech = transformers.Wav2Vec2Model(transformers.Wav2Vec2Config())
    cost = milliseconds(training(speech, input_values=torch.randn(1, READ * SECONDS)), 1)
    for kind in ("FLAC", "MP3"):
        content = noise(kind)
        read = milliseconds(lambda: resample(*read_sound(content), READ), 5)  # noqa: B023
        print(f"| {kind}, {SECONDS} s at {RATE:,} Hz | {read:.1f} | {cost:.0f} |")


if __name__ == "__main__":
    main()

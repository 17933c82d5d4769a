"""Sounds: decoded from bytes into one channel of float32, cut, and at the rate of a model."""

from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_cli.data.media import MediaError

Wave = NDArray[np.float32]

# Sizes in a header of a file that was written as a stream, whose length was not known.
_UNKNOWN_SIZES = (0, 0xFFFFFFFF)


def read_sound(content: bytes) -> tuple[Wave, int]:
    """Decode all of a sound.

    Returns:
        Samples of shape (T,), the mean of all channels, mostly between -1 and 1; and their number
        in a second.

    Raises:
        MediaError: If that cannot be done, or if there are none.
    """
    samples_TC, rate, _ = _decode(content)
    return samples_TC.mean(axis=1, dtype=np.float32), rate


def describe_sound(content: bytes) -> dict[str, Any]:
    """Decode a sound and return what the report of the data tells of it.

    Raises:
        MediaError: As `read_sound`.
    """
    samples_TC, rate, format_ = _decode(content)
    frames, channels = samples_TC.shape
    return {
        "measures": {"seconds": frames / rate},
        "kinds": {"sample rate": f"{rate} Hz", "channels": str(channels), "format": format_},
    }


def count_seconds(content: bytes) -> float:
    """Return the length that the header of a sound tells; 0 where it cannot be read."""
    import soundfile

    try:
        facts = soundfile.info(BytesIO(content))
    except soundfile.SoundFileError:
        return 0.0
    return float(facts.frames / facts.samplerate)


def cut_sound(samples: Wave, most: int, *, place: float) -> Wave:
    """Return at most so many samples.

    Args:
        samples: Of shape (T,).
        most: How many.
        place: Where to take them from: 0 is the start, 0.5 the middle and 1 the end.

    >>> cut_sound(np.arange(5, dtype=np.float32), 3, place=0.5).tolist()
    [1.0, 2.0, 3.0]
    """
    start = round(max(0, len(samples) - most) * place)
    return samples[start : start + most]


def resample(samples: Wave, rate: int, to: int) -> Wave:
    """Return a sound at another number of samples a second, without what that cannot hold."""
    if rate == to:
        return samples
    import soxr

    found: Wave = soxr.resample(samples, rate, to)
    return found


def _decode(content: bytes) -> tuple[Wave, int, str]:
    """Return samples of shape (T, channels), rate and format.

    Raises:
        MediaError: As `read_sound`.
    """
    import soundfile

    try:
        with soundfile.SoundFile(BytesIO(content)) as file:
            frames, rate, format_ = file.frames, file.samplerate, file.format
            samples_TC = file.read(dtype="float32", always_2d=True)
    except soundfile.SoundFileError as error:
        raise MediaError(_reason(error)) from error
    # Lengths of MP3 are estimates.
    if len(samples_TC) < frames and format_ != "MP3":
        raise MediaError(f"cut off after {len(samples_TC):,} of {frames:,} samples")
    if missing := _missing_bytes(content):
        raise MediaError(f"cut off, {missing:,} bytes are missing at the end")
    if not len(samples_TC):
        raise MediaError("without samples")
    if not np.isfinite(samples_TC).all():
        raise MediaError("with samples that are not finite")
    return samples_TC, rate, format_


def _missing_bytes(content: bytes) -> int:
    """Return how many bytes of samples a WAV file announces and does not have.

    Its reader takes what is there, and says nothing.
    """
    if content[:4] != b"RIFF" or content[8:12] != b"WAVE":
        return 0
    place = 12
    while place + 8 <= len(content):
        name, size = (
            content[place : place + 4],
            int.from_bytes(content[place + 4 : place + 8], "little"),
        )
        if name == b"data":
            return 0 if size in _UNKNOWN_SIZES else max(0, place + 8 + size - len(content))
        # Chunks begin at even places.
        place += 8 + size + size % 2
    return 0


def _reason(error: Exception) -> str:
    text = str(getattr(error, "error_string", error)).strip().rstrip(".")
    return (text[:1].lower() + text[1:])[:120] or type(error).__name__

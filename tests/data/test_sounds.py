"""Sounds in every format, whole and broken, beside soundfile and scipy."""

from io import BytesIO
from typing import Any

import numpy as np
import pytest
import scipy.signal
import soundfile
from tiny_sounds import tone, wav

from lora_cli.data.media import MediaError
from lora_cli.data.sounds import count_seconds, cut_sound, describe_sound, read_sound, resample


def encoded(samples: Any, format_: str, rate: int = 8000, subtype: str | None = None) -> bytes:
    content = BytesIO()
    soundfile.write(content, samples, rate, format=format_, subtype=subtype)
    return content.getvalue()


@pytest.mark.parametrize(
    ("format_", "subtype", "near"),
    [
        ("WAV", "PCM_U8", 0.01),
        ("WAV", "PCM_16", 1e-4),
        ("WAV", "PCM_24", 1e-6),
        ("WAV", "FLOAT", 0),
        ("FLAC", "PCM_16", 1e-4),
        ("AIFF", "PCM_16", 1e-4),
        ("OGG", "VORBIS", 0.2),
        ("MP3", None, 0.2),
    ],
)
def test_formats_are_read(format_: str, subtype: str | None, near: float) -> None:
    samples = tone(440, 0.5)
    content = encoded(samples, format_, subtype=subtype)
    found, rate = read_sound(content)
    assert rate == 8000
    assert found.dtype == np.float32
    facts = describe_sound(content)
    assert facts["kinds"]["format"] == format_
    assert facts["measures"]["seconds"] == len(found) / rate
    assert count_seconds(content) == pytest.approx(len(found) / rate, rel=0.3)
    if format_ != "MP3":
        assert np.abs(found - samples).max() <= near


def test_channels_are_averaged() -> None:
    left, right = tone(440, 0.1), tone(700, 0.1)
    content = encoded(np.stack([left, right], 1), "WAV", subtype="FLOAT")
    assert np.allclose(read_sound(content)[0], (left + right) / 2, atol=1e-7)
    assert describe_sound(content)["kinds"]["channels"] == "2"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (wav(tone(440, 0.5))[:4000], "cut off, 4,044 bytes are missing at the end"),
        (wav([]), "without samples"),
        (b"no sound at all", "format not recognised"),
        (encoded(tone(440, 0.5), "FLAC")[:2000], "."),
        (encoded(np.array([0.1, np.nan]), "WAV", subtype="FLOAT"), "not finite"),
    ],
    # The last holds the second at which it was written: a name of its own in each process.
    ids=["cut", "without samples", "no sound", "cut flac", "not finite"],
)
def test_broken_files_are_refused(content: bytes, reason: str) -> None:
    with pytest.raises(MediaError, match=reason):
        read_sound(content)
    with pytest.raises(MediaError, match=reason):
        describe_sound(content)


def test_a_stream_of_unknown_length_is_read() -> None:
    content = bytearray(wav(tone(440, 0.1)))
    place = content.index(b"data") + 4
    content[place : place + 4] = b"\xff\xff\xff\xff"
    assert len(read_sound(bytes(content))[0]) == 800


def test_headers_of_no_sound_have_no_length() -> None:
    assert count_seconds(b"no sound at all") == 0


@pytest.mark.parametrize(("rate", "to"), [(8000, 16000), (44100, 16000), (16000, 16000)])
def test_resampling_keeps_the_tone(rate: int, to: int) -> None:
    found = resample(tone(440, 0.5, rate=rate), rate, to)
    expected = scipy.signal.resample(tone(440, 0.5, rate=rate), len(found))
    assert len(found) == to // 2
    # The ends are made up by either in its own way.
    inside = slice(to // 20, -to // 20)
    assert np.abs(found - expected)[inside].max() < 0.05


@pytest.mark.parametrize(("place", "expected"), [(0, [0, 1]), (0.5, [2, 3]), (1, [3, 4])])
def test_a_part_is_cut_out(place: float, expected: list[int]) -> None:
    samples = np.arange(5, dtype=np.float32)
    assert cut_sound(samples, 2, place=place).tolist() == expected
    assert cut_sound(samples, 9, place=place).tolist() == samples.tolist()

"""The script that times decoding: what it makes can be decoded, and what it counts is the work."""

from collections.abc import Callable
from types import ModuleType

from lora_cli.data.images import describe_image
from lora_cli.data.sounds import read_sound


def test_the_files_are_what_the_table_calls_them(script: Callable[[str], ModuleType]) -> None:
    decoding = script("decoding")
    told = describe_image(decoding.photo(640, 480))
    assert told["measures"] == {"width": 640, "height": 480}
    samples, rate = read_sound(decoding.noise("FLAC"))
    assert (len(samples), rate) == (decoding.RATE * decoding.SECONDS, decoding.RATE)


def test_the_first_call_is_not_counted(script: Callable[[str], ModuleType]) -> None:
    calls: list[int] = []
    script("decoding").milliseconds(lambda: calls.append(0), 3)
    assert len(calls) == 4

"""Lengths of time: what is one, and how long."""

import pytest

from lora_cli.config.duration import parse_duration


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("2h", 7200),
        ("90m", 5400),
        ("3600", 3600),
        (3600, 3600),
        (0.5, 0.5),
        ("1d12h", 129600),
        ("1h 30m 5s", 5405),
        ("1.5H", 5400),
        ("45s", 45),
    ],
)
def test_lengths_of_time(text: str | float, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "soon", "-1", "0", "0h", "30m1h", "1h1h", "1w", "1e3", "nan", "h", "1:30", None]
)
def test_what_is_no_length_of_time(text: str | None) -> None:
    assert parse_duration(text) is None

"""Sizes of files: what is read, and what is refused."""

import pytest

from lora_cli.config.size import parse_size


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("5GB", 5 * 10**9),
        ("200 mb", 2 * 10**8),
        ("64KB", 64_000),
        ("0GB", None),
        ("5", None),
        ("5GiB", None),
        ("-1GB", None),
        ("", None),
    ],
)
def test_sizes(text: str, expected: int | None) -> None:
    assert parse_size(text) == expected

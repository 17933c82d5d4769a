from types import SimpleNamespace

import pytest

from lora_cli.commands.catalogue import select, show_columns
from lora_cli.errors import UserError

ENTRIES = [
    {"name": "a", "language": "English", "columns": {"text": "review"}},
    {"name": "b", "language": "Chinese", "columns": {"text": "review"}},
]


@pytest.mark.parametrize(
    ("search", "names"), [(None, "ab"), ("review", "ab"), ("CHINESE review", "b"), ("name b", "")]
)
def test_every_word_must_be_found(search: str | None, names: str) -> None:
    if not names:
        with pytest.raises(UserError) as caught:
            select(ENTRIES, search, what="things")
        assert caught.value.problems[0].allowed == "a, b"
        return
    assert "".join(str(entry["name"]) for entry in select(ENTRIES, search, what="things")) == names


def test_columns_are_aligned_and_the_last_is_not_padded() -> None:
    lines: list[str] = []
    display = SimpleNamespace(output=lines.append)
    show_columns(display, [["a", "long one", "x"], ["bcd", "b", "yy"]], indent=1)  # type: ignore[arg-type]
    assert lines == [" a    long one  x", " bcd  b         yy"]

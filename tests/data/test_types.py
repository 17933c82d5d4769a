"""Rows: what they are called."""

import os

from lora_cli.data.types import Row


def test_a_row_of_a_folder_is_called_after_its_file() -> None:
    for value in ("cat/1.png", {"path": "cat/1.png", "file": "/x/cat/1.png"}):
        assert Row("7", {"label": "cat", "image": value}, f"pets{os.sep}", 3).where == (
            f"pets{os.sep}cat/1.png"
        )
    assert Row("7", {"image": "cat/1.png"}, "pets.csv", 3).where == "pets.csv row 3"

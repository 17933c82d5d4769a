from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from lora_cli.commands.encoding import encode_rows
from lora_cli.config.tasks import TextClassificationConfig
from lora_cli.data.types import Row
from lora_cli.tasks.text_classification import TextClassification


class Notes:
    """A display that keeps what it is told."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def note(self, text: str) -> None:
        self.texts.append(text)

    def track(self, label: str, items: Any) -> Any:
        assert label == "encode train"
        return iter(items)


def test_cut_rows_are_counted(tiny_model_dir: Callable[..., Path]) -> None:
    columns = {"text": "text", "text_pair": None, "label": "label"}
    state = {"labels": ["negative", "positive"], "columns": columns, "numbered": False}
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir())
    task = TextClassification().build(TextClassificationConfig(max_length=6), state, tokenizer)
    display: Any = Notes()
    rows = [Row(str(n), {"text": "a " * n, "label": "positive"}, "f", n) for n in range(1, 10)]
    features = encode_rows(task, rows, "train", display)
    # Two special tokens leave room for four words.
    assert [row["length"] for row in features] == [3, 4, 5, 6, 6, 6, 6, 6, 6]
    assert display.texts == ["train: task.max_length cut 5 of 9 rows"]

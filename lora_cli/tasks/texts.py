"""What the families share that read a text, or a pair of texts, with a tokenizer."""

from collections.abc import Mapping, Sequence
from typing import Any

from lora_cli.data.columns import LABEL_COLUMNS, TEXT_COLUMNS, check_texts
from lora_cli.data.made_up import label, second_text
from lora_cli.data.types import Row
from lora_cli.errors import Problem
from lora_cli.tasks.contract import Batch, Features
from lora_cli.tasks.rows import Columns, Role, read_columns

TEXTS = (Role("text", TEXT_COLUMNS), Role("text_pair", optional=True, made_up=second_text))
LABEL = Role("label", LABEL_COLUMNS, made_up=label)


def text_problems(rows: Sequence[Row], columns: Columns) -> list[Problem]:
    """Return a problem for each text column in which a row has no text."""
    return [p for column in read_columns(TEXTS, columns) for p in check_texts(rows, column)]


def encode_texts(row: Row, columns: Columns, tokenizer: Any, *, max_length: int) -> Features:
    """Tokenize the text, or both texts, of a row.

    Returns:
        ``id``; ``inputs``, what the tokenizer returns for one row; ``length``, its tokens; and
        ``cut``, the number of tokens that `max_length` left out; and ``supervised``, 1: the row.
    """
    texts = [row.values[column] for column in read_columns(TEXTS, columns)]
    inputs = dict(tokenizer(*texts))
    whole = len(inputs["input_ids"])
    if whole > max_length:
        inputs = dict(tokenizer(*texts, truncation=True, max_length=max_length))
    length = len(inputs["input_ids"])
    return {
        "id": row.id,
        "inputs": inputs,
        "length": length,
        "cut": whole - length,
        "supervised": 1,
    }


def pad_inputs(tokenizer: Any, features: Sequence[Features]) -> Mapping[str, Any]:
    """Stack the inputs of encoded rows, each padded to the longest: int64 of shape (B, T)."""
    return dict(tokenizer.pad([row["inputs"] for row in features], return_tensors="pt"))


class TextReader:
    """Reads the text, or both texts, of a row with a tokenizer, padded to the longest of a batch.

    Args:
        tokenizer: Of the model.
        columns: Of the rows, by role.
        max_length: Tokens to keep.
    """

    def __init__(self, tokenizer: Any, columns: Columns, *, max_length: int) -> None:
        self._tokenizer, self._columns, self._max_length = tokenizer, columns, max_length

    def encode(self, row: Row) -> Features:
        """Tokenize a row."""
        return encode_texts(row, self._columns, self._tokenizer, max_length=self._max_length)

    def collate(self, features: Sequence[Features]) -> Batch:
        """Pad to the longest row: `inputs` of shape (B, T)."""
        return {"inputs": pad_inputs(self._tokenizer, features)}

    def inputs(self, batch: Batch, model: Any) -> Mapping[str, Any]:
        """Return the tokens."""
        del model
        found: Mapping[str, Any] = batch["inputs"]
        return found


class TextFamily:
    """What the families share that read texts and give them labels."""

    def input_problems(self, rows: Sequence[Row], columns: Columns) -> list[Problem]:
        """Refuse rows without text."""
        return text_problems(rows, columns)

"""Rows that become several model inputs: one text against each of several candidates."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lora_cli.data.types import Row
from lora_cli.errors import Problem, UserError
from lora_cli.tasks.contract import Features

Inputs = dict[str, Any]


def encode_pair(tokenizer: Any, first: str, second: str, *, max_length: int) -> tuple[Inputs, int]:
    """Tokenize two texts as a pair, cutting the first where they are too long.

    It is cut on the tokenizer's `truncation_side`. The second is never cut: where it is too long
    by itself, the result is too.

    Returns:
        What the tokenizer returns for one row, and the number of tokens cut.
    """
    inputs = dict(tokenizer(first, second))
    whole = len(inputs["input_ids"])
    if whole <= max_length:
        return inputs, 0
    bare = dict(tokenizer("", second))
    if len(bare["input_ids"]) >= max_length:
        return bare, whole - len(bare["input_ids"])
    inputs = dict(tokenizer(first, second, truncation="only_first", max_length=max_length))
    return inputs, whole - len(inputs["input_ids"])


def encoded(row: Row, inputs: Sequence[Inputs], *, cut: int) -> Features:
    """Return the features of a row; `length` is that of its longest input."""
    length = max(len(one["input_ids"]) for one in inputs)
    return {"id": row.id, "inputs": list(inputs), "length": length, "cut": cut}


def check_room(row: Row, inputs: Sequence[Inputs], *, max_length: int, what: str) -> None:
    """Refuse inputs that are too long after all that may be cut was cut.

    Raises:
        UserError: If there are any.
    """
    longest = max(len(one["input_ids"]) for one in inputs)
    if longest > max_length:
        raise UserError(
            Problem(
                id="task.candidate-too-long",
                message=f"`task.max_length` must leave room for every {what}, which is never cut, "
                f"but is {max_length}, and one needs {longest} tokens.",
                key="task.max_length",
                where=row.where,
                fix=f"task.max_length={longest} or more, or remove the row",
            )
        )


def pad_flat(tokenizer: Any, features: Sequence[Features]) -> Mapping[str, Any]:
    """Stack all inputs of all rows, (M, T): those of the first row, of the second, ..."""
    return dict(
        tokenizer.pad([one for row in features for one in row["inputs"]], return_tensors="pt")
    )


def pad_choices(tokenizer: Any, features: Sequence[Features]) -> Mapping[str, Any]:
    """Stack the inputs of rows, (B, N, T), for N of the row with most.

    A row with fewer repeats its first input: inputs without any token to attend to make some
    models compute what is no number.
    """
    most = max(len(row["inputs"]) for row in features)
    filled = [
        {"inputs": row["inputs"] + row["inputs"][:1] * (most - len(row["inputs"]))}
        for row in features
    ]
    flat = pad_flat(tokenizer, filled)
    return {name: value.view(len(features), most, -1) for name, value in flat.items()}


def places_mask(counts: Sequence[int]) -> torch.Tensor:
    """Return (B, N), true in row b for its `counts[b]` first places.

    >>> places_mask([1, 2]).tolist()
    [[True, False], [True, True]]
    """
    return torch.arange(max(counts)) < torch.tensor(counts).unsqueeze(1)

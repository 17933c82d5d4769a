from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from lora_cli.data.types import Row
from lora_cli.errors import UserError
from lora_cli.tasks.candidates import (
    check_room,
    encode_pair,
    encoded,
    pad_choices,
    pad_flat,
    places_mask,
)

FIRST, SECOND = "one two first last people see", "a good film"


@pytest.fixture
def tokenizer(tiny_model_dir: Callable[..., Path]) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model_dir())


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("max_length", range(6, 14))
def test_the_first_text_is_cut_and_the_second_never(
    tokenizer: Any, max_length: int, side: str
) -> None:
    tokenizer.truncation_side = side
    inputs, cut = encode_pair(tokenizer, FIRST, SECOND, max_length=max_length)
    words = FIRST.split()
    kept = 6 - cut
    left = words[len(words) - kept :] if side == "left" else words[:kept]
    expected = " ".join(["[CLS]", *left, "[SEP] a good film [SEP]"])
    assert tokenizer.decode(inputs["input_ids"]) == expected
    assert cut == max(0, 12 - max_length)
    assert len(inputs["input_ids"]) == len(inputs["token_type_ids"])


def test_what_is_too_long_by_itself_is_refused_by_row(tokenizer: Any) -> None:
    inputs, cut = encode_pair(tokenizer, FIRST, SECOND, max_length=5)
    assert (len(inputs["input_ids"]), cut) == (6, 6)
    row = Row("3", {}, "f.jsonl", 3)
    with pytest.raises(UserError) as caught:
        check_room(row, [inputs], max_length=5, what="choice")
    (problem,) = caught.value.problems
    assert (problem.id, problem.where) == ("task.candidate-too-long", "f.jsonl row 3")
    assert problem.fix is not None
    assert problem.fix.startswith("task.max_length=6")
    check_room(row, [inputs], max_length=6, what="choice")


def rows_of(tokenizer: Any, *texts: list[str]) -> list[dict[str, Any]]:
    rows = []
    for number, own in enumerate(texts):
        inputs = [encode_pair(tokenizer, "the", text, max_length=64)[0] for text in own]
        rows.append(encoded(Row(str(number), {}, "f", number), inputs, cut=0))
    return rows


def test_rows_are_stacked_flat_or_by_choice(tokenizer: Any) -> None:
    rows = rows_of(tokenizer, ["film", "a good film"], ["bad", "fine", "good story"])
    assert [row["length"] for row in rows] == [7, 6]
    flat = pad_flat(tokenizer, rows)
    assert flat["input_ids"].shape == (5, 7)
    stacked = pad_choices(tokenizer, rows)
    assert {value.shape for value in stacked.values()} == {(2, 3, 7)}
    mask = places_mask([2, 3])
    assert torch.equal(stacked["input_ids"][mask], flat["input_ids"])
    # What fills a place is a real input: a mask of nothing but zeros makes some models say NaN.
    assert torch.equal(stacked["input_ids"][0, 2], stacked["input_ids"][0, 0])
    assert stacked["attention_mask"].sum(-1).min() > 0

from collections.abc import Callable
from pathlib import Path

from transformers import AutoTokenizer

from lora_cli.data.types import Row
from lora_cli.tasks.texts import encode_texts, pad_inputs, text_problems

PAIR = {"text": "a", "text_pair": "b"}


def test_rows_are_encoded_cut_and_padded(tiny_model_dir: Callable[..., Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir())
    row = Row("1", {"a": "a good film", "b": "the story"}, "rows.jsonl", 1)
    whole = encode_texts(row, PAIR, tokenizer, max_length=20)
    assert whole["inputs"] == dict(tokenizer("a good film", "the story"))
    assert (whole["length"], whole["cut"]) == (8, 0)
    cut = encode_texts(row, PAIR, tokenizer, max_length=6)
    assert (cut["length"], cut["cut"]) == (6, 2)
    batch = pad_inputs(tokenizer, [whole, cut])
    assert batch["attention_mask"].tolist() == [[1] * 8, [1] * 6 + [0] * 2]


def test_both_texts_are_checked() -> None:
    rows = [Row("1", {"a": "", "b": "x"}, "rows.jsonl", 1), Row("2", {"a": "x"}, "rows.jsonl", 2)]
    problems = text_problems(rows, PAIR)
    assert [problem.where for problem in problems] == [
        "rows.jsonl row 1 (empty)",
        "rows.jsonl row 2 (missing)",
    ]

import math

import pytest
import torch

from lora_cli.config.generation import GenerationConfig
from lora_cli.tasks.language import Score
from lora_cli.tasks.written import WrittenText, written_metrics, written_outputs, written_texts

ROWS = [{"id": "1", "references": ["a b", "a c"]}, {"id": "2", "references": []}, {"id": "3"}]


class Letters:
    """Token n is the letter n of the alphabet."""

    def decode(self, tokens: list[int], *, skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return " ".join("abcdef"[token] for token in tokens)


def test_each_row_gets_its_text_and_whether_it_ended() -> None:
    outputs = written_outputs([[0, 1], [], [2]], [True, False, False], device=torch.device("cpu"))
    assert outputs["texts"].shape == (3, 2)
    found = written_texts(Letters(), outputs, {"rows": ROWS}, GenerationConfig())
    assert found == [
        WrittenText("1", "a b", True, None, ("a b", "a c")),
        WrittenText("2", "", False, None, ()),
        WrittenText("3", "c", False, None, ()),
    ]


def test_rows_of_which_nothing_was_written_are_scored_alone() -> None:
    said = torch.tensor([[[0.0, 0.0], [-1.0, -2.0], [-3.0, -2.0]]])
    learned = torch.tensor([[False, True, True]])
    batch = {"rows": ROWS[:1], "learned": learned, "lines": [1]}
    (found,) = written_texts(Letters(), {"log_probs": said}, batch, GenerationConfig())
    assert (found.text, found.is_ended, found.score) == (None, None, Score(4.0, 1, 2))


def test_texts_count_where_something_was_wanted() -> None:
    """A row without a reference changes no metric of texts, and one without a score no loss."""
    said = [
        WrittenText("1", "a b", True, Score(2.0, 1, 2), ("x", "a b")),
        WrittenText("2", "q", False, Score(6.0, 1, 2), ("a b",)),
        WrittenText("3", "q", False, None, ()),
    ]
    found = written_metrics(said)
    assert found["perplexity"] == pytest.approx(math.exp(8 / 4))
    assert found["token_accuracy"] == 0.5
    assert (found["exact_match"], found["ended"]) == (0.5, 0.5)
    assert set(written_metrics(said[2:])) == {"perplexity", "token_accuracy"}

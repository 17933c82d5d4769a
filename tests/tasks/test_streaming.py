from collections.abc import Sequence

import pytest
import torch

from lora_cli.tasks.streaming import TextStream, stream_to

TOKENS = ["I ", "like ", "En", "d: ", "x", "\ufffd", "Enough", " End", ":", " more"]


def read_without(stop: Sequence[str], tokens: Sequence[int]) -> str:
    """As tokenizers do with bytes: a character whose last part is missing is broken."""
    text = "".join(TOKENS[token] for token in tokens)
    text = text.replace("\ufffdEnough", "界 Enough")
    for one in stop:
        text = text.partition(one)[0]
    return text.strip()


def stream(tokens: Sequence[int], stop: Sequence[str]) -> list[str]:
    pieces: list[str] = []
    made = TextStream(lambda row: read_without(stop, row), stop=stop, write=pieces.append)
    for _ in range(2):
        pieces.clear()
        made.put(torch.tensor([[7, 7, 7]]))
        for token in tokens:
            made.put(torch.tensor([token]))
        made.end()
    return pieces


@pytest.mark.parametrize("stop", [(), ("End:",), ("nothing", "End:"), ("d: x",)])
@pytest.mark.parametrize("count", range(len(TOKENS) + 1))
def test_pieces_are_the_text(stop: tuple[str, ...], count: int) -> None:
    tokens = list(range(count))
    pieces = stream(tokens, stop)
    assert "".join(pieces) == read_without(stop, tokens)
    assert all(pieces)


def test_what_may_be_the_beginning_of_a_stop_text_is_held_back() -> None:
    assert stream([0, 1, 2, 3, 4], ("End:",)) == ["I", " like"]
    assert stream([0, 1, 2, 6], ("End:",)) == ["I", " like", " EnEnough"]
    assert stream([0, 1, 2, 3], ()) == ["I", " like", " En", "d:"]


def test_broken_characters_are_held_back() -> None:
    assert stream([4, 5, 6], ()) == ["x", "界 Enough"]
    assert stream([4, 5], ()) == ["x", "\ufffd"]


def test_nobody_wants_to_be_told() -> None:
    assert stream_to(None, lambda _: "", ()) is None

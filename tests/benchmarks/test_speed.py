"""The table of `speed.py`, from blocks that were made up, and the start of its workers."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn


@pytest.fixture(scope="module")
def speed(script: Callable[[str], ModuleType]) -> Any:
    return script("speed")


def block(seconds: float, **more: Any) -> dict[str, Any]:
    plain = {"rows": 64, "losses": [1.0], "others": 0.1, "peak_rss_bytes": 5e8}
    return {**plain, "seconds": seconds, **more}


def test_ratios_are_those_of_the_same_repetition(speed: Any) -> None:
    found = {"a": [block(4.0), block(8.0)], "b": [block(2.0), block(2.0, peak_rss_bytes=7e8)]}
    assert speed.row_of("a", found) == "| a | 12.00 | 1.00 [1.00-1.00] | 500 |"
    assert speed.row_of("b", found) == "| b | 32.00 | 3.00 [2.00-4.00] | 700 |"


def test_losses_must_be_equal_where_batches_are(speed: Any) -> None:
    first = {
        "a": {"losses": [1.0, 0.9]},
        "a, bf16": {"losses": [1.01, 0.91]},
        "a, grouped by length": {"losses": [7.0, 7.0]},
    }
    speed.check_losses(first)
    first["b"] = {"losses": [1.0, 0.901]}
    with pytest.raises(SystemExit, match=r"losses differ: a .*, b "):
        speed.check_losses(first)


def test_the_start_is_drawn_by_name(script: Callable[[str], ModuleType]) -> None:
    worker = script("speed_worker")

    class Ours(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query = nn.ModuleDict({"lora_A": nn.Linear(3, 2), "lora_B": nn.Linear(2, 3)})
            self.drop = nn.Dropout(0.1)

    class Theirs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base_model = nn.ModuleDict({"model": Ours()})

    ours, theirs = Ours(), Theirs()
    worker.draw_start(ours)
    worker.draw_start(theirs)
    inner: Any = theirs.base_model["model"]
    assert torch.equal(ours.query["lora_A"].weight, inner.query["lora_A"].weight)
    assert ours.query["lora_A"].weight.any()
    assert not ours.query["lora_B"].weight.any()
    assert inner.drop.p == 0.0

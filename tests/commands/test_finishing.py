from types import SimpleNamespace
from typing import Any

import pytest

from lora_cli.commands.finishing import compared_forms, first_metrics
from lora_cli.commands.phases import FirstPhase


def test_the_first_line_of_an_event_counts() -> None:
    lines = [
        {"event": "train", "loss": 1.0},
        {"event": "eval", "metrics": {"loss": 2.0}},
        {"event": "eval", "metrics": {"loss": 3.0}},
    ]
    assert first_metrics(lines, "eval") == {"loss": 2.0}
    assert first_metrics(lines, "base") == {}


@pytest.mark.parametrize(
    ("merged_start", "has_first", "names"),
    [
        (None, False, ["base", "adapter", "merged"]),
        (True, False, ["base", "adapter", "merged"]),
        (False, False, ["base", "start", "adapter", "merged"]),
        (None, True, ["base", "lora", "adapter", "merged"]),
    ],
)
def test_the_forms_that_there_are(
    merged_start: bool | None, has_first: bool, names: list[str]
) -> None:
    start = None if merged_start is None else SimpleNamespace(is_merged=merged_start)
    prepared: Any = SimpleNamespace(start=start)
    first = FirstPhase(steps=1, reason="finished", progress={}, metrics={"x": 3.0})
    found = compared_forms(
        prepared,
        first if has_first else None,
        base={"x": 1.0},
        start={"x": 2.0},
        adapter={"x": 4.0},
        merged=None,
    )
    assert list(found) == names
    assert found["adapter"] == {"x": 4.0}
    assert found["merged"] is None

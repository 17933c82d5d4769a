"""Rows turned into what a task reads."""

from collections.abc import Sequence

from lora_cli.commands.display import Display
from lora_cli.data.types import Row
from lora_cli.tasks.contract import Features, Task


def encode_rows(task: Task, rows: Sequence[Row], name: str, display: Display) -> list[Features]:
    """Encode rows in order, and say how many were cut."""
    features = [task.encode(row) for row in display.track(f"encode {name}", rows)]
    cut = sum(bool(row.get("cut")) for row in features)
    if cut:
        display.note(f"{name}: task.max_length cut {cut:,} of {len(rows):,} rows")
    return features

"""What tests of the commands know of a run that they trained."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class TrainedRun:
    """A finished run, the base and the rows that it was trained on, and the arguments."""

    path: Path
    base: Path
    data: Path
    settings: tuple[str, ...]

    @property
    def result(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.path / "result.json").read_text())
        return found

"""rows.jsonl: which rows each optimizer step has trained on."""

import json
from pathlib import Path

from lora_cli.artifacts.commit import replace_file, sync_path
from lora_cli.log import logger
from lora_cli.training.events import CheckpointDue, Event, RunStarted, StepDone


class RowLog:
    """Listener that appends one line per optimizer step, {"step": n, "ids": [...]}.

    Told of a checkpoint before the `Checkpointer` is, it forces to disk what came before. Lines of
    steps that a resumed run repeats are removed, whether it adds any or not.

    Args:
        run: The run directory.
        is_on: Whether to add lines, as `trainer.log_rows` says.
    """

    def __init__(self, run: Path, *, is_on: bool) -> None:
        self._path = run / "rows.jsonl"
        self._is_on = is_on

    def __call__(self, event: Event) -> None:
        """Write the rows of a step."""
        if isinstance(event, RunStarted) and self._path.exists():
            self._cut_after(event.first_step)
        if not self._is_on:
            return
        if isinstance(event, RunStarted) and not self._path.exists():
            # Its name, too, must outlast a power cut.
            replace_file(self._path, b"")
        elif isinstance(event, StepDone):
            line = json.dumps({"step": event.step, "ids": list(event.ids)})
            with self._path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        elif isinstance(event, CheckpointDue):
            sync_path(self._path)

    def _cut_after(self, step: int) -> None:
        """Leave out the lines of later steps, and what follows a damaged line."""
        kept = 0
        with self._path.open("r+b") as file:
            for number, line in enumerate(file, start=1):
                found = _step_of(line)
                if found is None and line.endswith(b"\n"):
                    logger.warning("warning: %s is damaged from line %d on", self._path, number)
                if found is None or found > step:
                    break
                kept += len(line)
            file.truncate(kept)


def _step_of(line: bytes) -> int | None:
    """Return the step of a line, or None where the line is damaged or was cut off."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, RecursionError, TypeError, LookupError):
        return None
    return step if isinstance(step, int) and line.endswith(b"\n") else None

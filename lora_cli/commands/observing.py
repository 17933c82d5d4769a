"""Who is told of a run besides those who need to be: status.json and the trackers."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import Lock

from lora_cli.artifacts.run_dir import write_json
from lora_cli.artifacts.run_state import StatusFile
from lora_cli.config.commands import TrainConfig
from lora_cli.config.composed import Composed
from lora_cli.config.redaction import redact
from lora_cli.config.schema import flatten, show
from lora_cli.log import logger
from lora_cli.training.events import Event, Listener
from lora_cli.training.trackers import FINISH_SECONDS, Trackers
from lora_cli.training.tracking import TrackedRun

IDS = "trackers.json"
# An interrupt does not wait for servers.
_HURRY_SECONDS = 1.0


@contextmanager
def observing(path: Path, composed: Composed) -> Iterator[Listener]:
    """Give a listener that keeps others up to date, none of which can do harm to the run.

    Args:
        path: The run directory; nothing is written before the first event.
        composed: What is trained.
    """
    config: TrainConfig = composed.config
    status = StatusFile(path)
    trackers = Trackers(config.tracker, tracked_run(path, composed), warn=_warn)

    def tell(event: Event) -> None:
        status(event)
        trackers(event)

    try:
        try:
            yield tell
        finally:
            status.flush()
    except KeyboardInterrupt:
        trackers.close(_HURRY_SECONDS)
        raise
    except BaseException:
        trackers.close(FINISH_SECONDS)
        raise
    trackers.close(FINISH_SECONDS)


def tracked_run(path: Path, composed: Composed) -> TrackedRun:
    """Return what trackers are told of a run: everything that was set, without secrets."""
    config: TrainConfig = composed.config
    ids = _read_ids(path / IDS)
    writing = Lock()

    def remember(tracker: str, known: str) -> None:
        # Each tracker has a thread.
        with writing:
            ids[tracker] = known
            write_json(path / IDS, ids)

    settings = flatten(redact(composed.plain))
    return TrackedRun(
        folder=path,
        project=redact(config.tracking.project),
        name=redact(config.tracking.name or path.resolve().name),
        config={
            name: value if isinstance(value, str | int | float | None) else show(value)
            for name, value in settings.items()
        },
        ids=ids,
        remember=remember,
    )


def _read_ids(path: Path) -> dict[str, str]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    is_sound = isinstance(value, Mapping) and all(isinstance(x, str) for x in value.values())
    return dict(value) if is_sound else {}


def _warn(text: str) -> None:
    logger.warning("warning: %s", text)

"""How each tracker is started, through Accelerate where it knows the program."""

import logging
import netrc
import os
import sys
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from accelerate.tracking import MLflowTracker, TensorBoardTracker, TrackioTracker, WandBTracker

from lora_cli.training.metrics_csv import CsvTracker

# Set before a tracker is imported: nothing is sent about its use or its errors.
_NO_TELEMETRY = {
    "WANDB_ERROR_REPORTING": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "GRADIO_ANALYTICS_ENABLED": "False",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class TrackedRun:
    """What trackers are told of a run.

    Attributes:
        folder: The run directory.
        project: Project or experiment.
        name: Name of the run.
        config: Every setting by its dotted name, without secrets.
        ids: By tracker, what an earlier session was called there.
        remember: Told what this session is called there.
        last_step: Steps done before this session; -1 for a new run.
    """

    folder: Path
    project: str
    name: str
    config: Mapping[str, Any]
    ids: Mapping[str, str]
    remember: Callable[[str, str], None]
    last_step: int = -1

    def resumed_after(self, step: int) -> "TrackedRun":
        """Return the same for a session that begins after so many steps."""
        return replace(self, last_step=step) if step > 0 else replace(self, ids={})

    @property
    def is_new(self) -> bool:
        """Whether trackers have not heard of the run."""
        return self.last_step < 0


def _tensorboard(run: TrackedRun) -> TensorBoardTracker:
    # What a lost session has logged beyond the checkpoint is hidden.
    again = {} if run.is_new else {"purge_step": run.last_step + 1}
    tracker = TensorBoardTracker("tensorboard", run.folder, **again)
    tracker.start()
    if run.is_new:
        tracker.store_init_configuration(dict(run.config))
    return tracker


def _wandb(run: TrackedRun) -> WandBTracker:
    import wandb

    known = run.ids.get("wandb") or uuid.uuid4().hex[:8]
    run.remember("wandb", known)
    tracker = WandBTracker(
        run.project,
        name=run.name,
        id=known,
        resume="allow",
        dir=str(run.folder),
        mode=_wandb_mode(),
        settings=wandb.Settings(
            silent=True,
            console="off",
            disable_git=True,
            save_code=False,
            # The command line, host and user are nobody's business.
            x_disable_meta=True,
            x_disable_stats=True,
            x_disable_machine_info=True,
        ),
    )
    tracker.start()
    if run.is_new:
        tracker.store_init_configuration(dict(run.config))
    return tracker


def _wandb_mode() -> Any:
    """Return the mode that the user chose, else offline where nobody is logged in: never ask."""
    if mode := os.environ.get("WANDB_MODE"):
        return mode
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return "online"
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    place = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
        is_logged_in = netrc.netrc(place).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        is_logged_in = False
    return "online" if is_logged_in else "offline"


def _mlflow(run: TrackedRun) -> MLflowTracker:
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)
    import mlflow

    logging.getLogger("mlflow").setLevel(logging.ERROR)
    artifacts = None
    if not os.environ.get("MLFLOW_TRACKING_URI"):
        folder = run.folder.resolve() / "mlruns"
        folder.mkdir(exist_ok=True)
        mlflow.set_tracking_uri(f"sqlite:///{folder / 'mlflow.db'}")
        artifacts = (folder / "artifacts").as_uri()
    tracker = MLflowTracker(
        experiment_name=run.project,
        logging_dir=artifacts,
        run_id=run.ids.get("mlflow"),
        run_name=run.name,
    )
    tracker.start()
    run.remember("mlflow", tracker.active_run.info.run_id)
    if run.is_new:
        tracker.store_init_configuration(dict(run.config))
    return tracker


def _trackio(run: TrackedRun) -> TrackioTracker:
    if "trackio" not in sys.modules:
        os.environ.setdefault("TRACKIO_DIR", str(run.folder.resolve() / "trackio"))
    tracker = TrackioTracker(
        run.project,
        name=run.name,
        resume="never" if run.is_new else "allow",
        config=dict(run.config),
        embed=False,
        auto_log_gpu=False,
        auto_log_cpu=False,
    )
    tracker.start()
    return tracker


def _csv(run: TrackedRun) -> CsvTracker:
    return CsvTracker(run.folder / "metrics.csv", last_step=run.last_step)


def _private(opener: Callable[[TrackedRun], Any]) -> Callable[[TrackedRun], Any]:
    def start(run: TrackedRun) -> Any:
        for name, value in _NO_TELEMETRY.items():
            os.environ.setdefault(name, value)
        return opener(run)

    return start


OPENERS: dict[str, Callable[[TrackedRun], Any]] = {
    "tensorboard": _private(_tensorboard),
    "wandb": _private(_wandb),
    "mlflow": _private(_mlflow),
    "trackio": _private(_trackio),
    "csv": _csv,
}

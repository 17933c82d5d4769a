"""Programs that record runs: TensorBoard, Weights & Biases, MLflow, trackio and a CSV file.

Each works in a thread of its own. One that fails, hangs or cannot keep up is left out with one
warning, and the run goes on. They write below the run directory, and are told to send nothing
about themselves; only Weights & Biases, where the user is logged in, and an MLflow or trackio
server that the environment names, are sent what is measured.
"""

import contextlib
import importlib.util
import io
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

from lora_cli.errors import Problem, UserError
from lora_cli.training.events import EvalDone, Event, RunStarted, StepDone
from lora_cli.training.tracking import OPENERS, TrackedRun

# What each tracker imports.
PACKAGES: dict[str, tuple[str, ...]] = {
    "tensorboard": ("tensorboard",),
    "wandb": ("wandb",),
    "mlflow": ("mlflow", "sqlalchemy", "alembic"),
    "trackio": ("trackio",),
    "csv": (),
}
START_SECONDS = 60.0
FINISH_SECONDS = 30.0
# Reports that may wait: a tracker that is so far behind will not catch up.
MAX_WAITING = 1000


class Tracker(Protocol):
    """What is asked of a tracker: the trackers of Accelerate have it."""

    def log(self, values: dict[str, float], step: int) -> None:
        """Record what was measured at a step."""

    def finish(self) -> None:
        """Write or send what is left."""


Opener = Callable[[TrackedRun], Tracker]


def check_installed(names: Sequence[str]) -> None:
    """Check that the packages are there which the trackers need.

    Raises:
        UserError: If one is not.
    """
    problems = []
    for name in dict.fromkeys(names):
        missing = [x for x in PACKAGES[name] if importlib.util.find_spec(x) is None]
        if missing:
            problems.append(
                Problem(
                    id="tracker.missing-extra",
                    message=f"`tracker` must name what is installed, but {name} needs"
                    f" {', '.join(missing)}, which is not.",
                    key="tracker",
                    fix='pip install "lora-cli[tracking]"',
                )
            )
    if problems:
        raise UserError(problems)


class Trackers:
    """Listener that passes on what is measured.

    The trackers are started by the first event, when the run directory is ready.

    Args:
        names: Of the trackers.
        run: What they are told of the run.
        warn: Told in one sentence of a tracker that is left out.
        openers: How to start each.
    """

    def __init__(
        self,
        names: Sequence[str],
        run: TrackedRun,
        *,
        warn: Callable[[str], None],
        openers: Mapping[str, Opener] = OPENERS,
    ) -> None:
        self._names = tuple(dict.fromkeys(names))
        self._run = run
        self._warn = warn
        self._openers = openers
        self._workers: dict[str, _Worker] = {}
        self._has_begun = False

    def __call__(self, event: Event) -> None:
        """Pass on what an event says was measured."""
        if isinstance(event, RunStarted) and not self._has_begun:
            self._start(event.first_step)
        elif isinstance(event, StepDone) and event.log:
            names = ("loss", "lr", "grad_norm", "samples_per_second", "epoch")
            self._log({f"train/{name}": getattr(event, name) for name in names}, event.step)
        elif isinstance(event, EvalDone):
            values = {f"eval/{name}": value for name, value in event.metrics.items()}
            self._log(values, event.step)
        self._leave_out_failed()

    def close(self, seconds: float = FINISH_SECONDS) -> None:
        """Let the trackers finish, for at most so long."""
        with _silence():
            for worker in self._workers.values():
                worker.end()
            until = time.monotonic() + seconds
            for name, worker in list(self._workers.items()):
                if not worker.wait(until - time.monotonic()):
                    self._leave_out(name, f"it did not finish within {seconds:.0f} s")
            self._leave_out_failed()
        self._workers.clear()

    def _start(self, first_step: int) -> None:
        self._has_begun = True
        run = self._run.resumed_after(first_step)
        with _silence():
            for name in self._names:
                self._workers[name] = _Worker(name, partial(self._openers[name], run))
            until = time.monotonic() + START_SECONDS
            for name, worker in list(self._workers.items()):
                if not worker.wait_until_open(until - time.monotonic()):
                    self._leave_out(name, f"it did not start within {START_SECONDS:.0f} s")
        self._leave_out_failed()

    def _log(self, values: dict[str, float], step: int) -> None:
        for name, worker in list(self._workers.items()):
            if not worker.log(values, step):
                self._leave_out(name, "it does not keep up")

    def _leave_out_failed(self) -> None:
        for name, worker in list(self._workers.items()):
            if worker.error is not None:
                text = " ".join(str(worker.error).split())
                self._leave_out(name, f"{type(worker.error).__name__}: {text[:300]}")

    def _leave_out(self, name: str, reason: str) -> None:
        self._workers.pop(name).end()
        self._warn(f"tracker={name} is left out from here on: {reason}")


class _Worker:
    """One tracker in a thread, which ends with the program whatever it does."""

    def __init__(self, name: str, start: Callable[[], Tracker]) -> None:
        self.error: BaseException | None = None
        self._start = start
        self._is_open = threading.Event()
        self._waiting: queue.Queue[tuple[dict[str, float], int] | None] = queue.Queue(MAX_WAITING)
        self._thread = threading.Thread(target=self._work, name=f"tracker-{name}", daemon=True)
        self._thread.start()

    def log(self, values: dict[str, float], step: int) -> bool:
        """Hand on a report; false if too many wait already."""
        try:
            self._waiting.put_nowait((values, step))
        except queue.Full:
            return False
        return True

    def end(self) -> None:
        """Ask it to finish."""
        with contextlib.suppress(queue.Full):
            self._waiting.put_nowait(None)

    def wait_until_open(self, seconds: float) -> bool:
        """Whether it has started or failed within a time."""
        return self._is_open.wait(max(seconds, 0.0))

    def wait(self, seconds: float) -> bool:
        """Whether it has ended within a time."""
        self._thread.join(max(seconds, 0.0))
        return not self._thread.is_alive()

    def _work(self) -> None:
        try:
            tracker = self._start()
            self._is_open.set()
            while (report := self._waiting.get()) is not None:
                tracker.log(*report)
            tracker.finish()
        except BaseException as error:  # noqa: BLE001  # whatever a tracker does, the run goes on
            self.error = error
        finally:
            self._is_open.set()


@contextlib.contextmanager
def _silence() -> Any:
    """Keep what trackers print when they start and finish from stdout, which is for results."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield

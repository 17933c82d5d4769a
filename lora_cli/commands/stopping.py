"""Stop requests: Ctrl-C, the signals by which schedulers end a job, and `trainer.max_time`."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from lora_cli.commands.display import Display
from lora_cli.errors import Interrupted, Problem, RunFailedError
from lora_cli.ranks import is_signal_ours
from lora_cli.training.events import CheckpointDue, Event, Listener

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Whether the run should end now, because of a signal or of the time; calling it tells.

    While nothing new could be saved, a signal ends the command at once: `Interrupted` is raised
    wherever the program is. Within `deferring` the first one is a request that the training loop
    follows when it has finished its step, and the second Ctrl-C does not wait for that.

    Args:
        display: Told of a signal that has to wait.
        max_seconds: Time that this session may take; None for any.
        clock: Seconds since any moment, which never go back.

    Attributes:
        signal: The first signal that arrived, or None.
        timed_out: Whether the time was up before a signal arrived.
    """

    def __init__(
        self,
        display: Display,
        *,
        max_seconds: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._display = display
        self._max_seconds = max_seconds
        self._clock = clock
        self._began = clock()
        self._save_seconds = 0.0
        self._defers = False
        self._unsaid = ""
        self.signal: signal.Signals | None = None
        self.timed_out = False

    def __call__(self) -> bool:
        """Return whether a signal has arrived, or the time is up."""
        if self.signal is None and not self.timed_out and self._max_seconds is not None:
            # What is left must be enough to save.
            elapsed = self._clock() - self._began + self._save_seconds
            self.timed_out = elapsed >= self._max_seconds
        self._say()
        return self.signal is not None or self.timed_out

    @property
    def cause(self) -> str:
        """What has stopped the run, to follow "stopped"."""
        return "by its time limit, `trainer.max_time`" if self.timed_out else "on request"

    def timed(self, listener: Listener) -> Listener:
        """Return the listener, and learn from it how long saving takes."""

        def tell(event: Event) -> None:
            began = self._clock()
            listener(event)
            if isinstance(event, CheckpointDue):
                self._save_seconds = max(self._save_seconds, self._clock() - began)

        return tell

    def nothing_saved(self) -> BaseException:
        """Return what ends a run that was stopped before there was anything to save."""
        if not self.timed_out:
            return Interrupted(self.signal or signal.SIGINT)
        return RunFailedError(
            Problem(
                id="trainer.max-time",
                message="`trainer.max_time` must leave time for a first step, but it was over"
                f" after {self._clock() - self._began:.0f} s, before one was done.",
                key="trainer.max_time",
                fix="give the run more time",
            )
        )

    def nothing_new(self, step: int) -> RunFailedError:
        """Return what ends a session whose time was up before it got beyond where it began."""
        return RunFailedError(
            Problem(
                id="trainer.max-time",
                message="`trainer.max_time` must leave time for a step or an evaluation, but it "
                f"was over after {self._clock() - self._began:.0f} s with nothing done beyond step "
                f"{step}, where this session began.",
                key="trainer.max_time",
                fix="give each session more time; everything up to that step is saved",
            )
        )

    def _handle(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        is_second = self.signal is not None
        self.signal = self.signal or signal.Signals(number)
        if not self._defers or (is_second and number == signal.SIGINT):
            raise Interrupted(number)
        if not is_second:
            self._unsaid = f"{self.signal.name}: saving after this step; Ctrl-C again stops at once"
            # A stream that was just being written to cannot be used here: then it has to wait. So
            # does what may only mean that another process has died, with which no step ends.
            if is_signal_ours(self.signal):
                with suppress(RuntimeError):
                    self._say()

    def _say(self) -> None:
        if self._unsaid:
            self._display.note(self._unsaid)
            self._unsaid = ""

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take the signals over, and give them back at the end."""
        before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def deferring(self) -> Iterator[None]:
        """Let signals wait for whoever asks, since there is something to save."""
        self._defers = True
        try:
            yield
        finally:
            self._defers = False

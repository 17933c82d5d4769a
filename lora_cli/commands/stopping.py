"""Stop requests: Ctrl-C and the signals by which schedulers end a job."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from lora_cli.commands.display import Display

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Whether somebody asked the run to stop; calling it tells.

    Attributes:
        signal: The first signal that arrived, or None.
    """

    def __init__(self, display: Display) -> None:
        self._display = display
        self.signal: signal.Signals | None = None

    def __call__(self) -> bool:
        """Return whether a signal has arrived."""
        return self.signal is not None

    def _handle(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = self.signal or signal.Signals(number)
        self._display.note(
            f"{signal.Signals(number).name}: saving after this step; Ctrl-C again stops at once"
        )

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take the signals over, and give them back at the end."""
        before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

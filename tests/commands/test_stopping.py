"""Signals become requests, a second Ctrl-C does not wait, and handlers are given back."""

import os
import signal
from typing import Any

import pytest

from lora_cli.commands.stopping import SIGNALS, StopRequest


class Notes:
    def __init__(self) -> None:
        self.texts: list[str] = []

    def note(self, text: str) -> None:
        self.texts.append(text)


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_is_a_request(number: signal.Signals) -> None:
    display: Any = Notes()
    stop = StopRequest(display)
    before = [signal.getsignal(each) for each in SIGNALS]
    with stop.listening():
        assert not stop()
        assert stop.signal is None
        os.kill(os.getpid(), number)
        assert stop()
        assert stop.signal == number
    assert [signal.getsignal(each) for each in SIGNALS] == before
    assert number.name in display.texts[0]


def test_a_second_interrupt_does_not_wait() -> None:
    display: Any = Notes()
    stop = StopRequest(display)
    before = signal.getsignal(signal.SIGINT)
    with stop.listening():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == before

"""Signals and the time limit: requests where there is something to save, the end where not."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from lora_cli.commands.stopping import SIGNALS, StopRequest
from lora_cli.errors import Interrupted, RunFailedError
from lora_cli.ranks import LAUNCH_FOLDER, note_signal
from lora_cli.training.events import CheckpointDue, Progress, RunEnded, TrainState


class Notes:
    def __init__(self) -> None:
        self.texts: list[str] = []
        self.is_busy = False

    def note(self, text: str) -> None:
        if self.is_busy:
            raise RuntimeError("reentrant call")
        self.texts.append(text)


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_is_a_request(number: signal.Signals) -> None:
    display: Any = Notes()
    stop = StopRequest(display)
    before = [signal.getsignal(each) for each in SIGNALS]
    with stop.listening(), stop.deferring():
        assert not stop()
        assert stop.signal is None
        os.kill(os.getpid(), number)
        assert stop()
        assert stop.signal == number
    assert [signal.getsignal(each) for each in SIGNALS] == before
    assert number.name in display.texts[0]
    assert stop.cause == "on request"


@pytest.mark.parametrize("number", SIGNALS)
def test_with_nothing_to_save_a_signal_does_not_wait(number: signal.Signals) -> None:
    stop = StopRequest(Notes())  # type: ignore[arg-type]  # all that it uses
    before = signal.getsignal(number)
    with stop.listening():
        with pytest.raises(Interrupted) as caught:
            os.kill(os.getpid(), number)
        with stop.deferring():
            pass
        with pytest.raises(Interrupted):
            os.kill(os.getpid(), number)
    assert caught.value.signal == number
    assert signal.getsignal(number) == before


def test_only_a_second_interrupt_does_not_wait() -> None:
    display: Any = Notes()
    stop = StopRequest(display)
    with stop.listening(), stop.deferring():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.signal == signal.SIGTERM
        assert len(display.texts) == 1
        with pytest.raises(Interrupted) as caught:
            os.kill(os.getpid(), signal.SIGINT)
    assert caught.value.signal == signal.SIGINT
    assert stop.signal == signal.SIGTERM


def test_a_note_that_comes_at_a_bad_time_is_shown_later() -> None:
    display: Any = Notes()
    stop = StopRequest(display)
    with stop.listening(), stop.deferring():
        display.is_busy = True
        os.kill(os.getpid(), signal.SIGTERM)
        display.is_busy = False
        assert display.texts == []
        assert stop()
        assert stop()
    assert len(display.texts) == 1


def test_the_end_that_comes_with_the_death_of_another_process_promises_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv(LAUNCH_FOLDER, str(tmp_path))
    display: Any = Notes()
    stop = StopRequest(display)
    with stop.listening(), stop.deferring():
        os.kill(os.getpid(), signal.SIGTERM)
        assert display.texts == []
        assert stop()  # a step has ended, so it does go on to save
        assert len(display.texts) == 1
    note_signal(tmp_path)
    stop = StopRequest(display)
    with stop.listening(), stop.deferring():
        os.kill(os.getpid(), signal.SIGTERM)
        assert len(display.texts) == 2


def test_the_time_limit_leaves_time_to_save() -> None:
    display: Any = Notes()
    clock = Clock()
    stop = StopRequest(display, max_seconds=60, clock=clock)
    due = CheckpointDue(TrainState(Progress(), {}, {}))

    def save(event: object) -> None:
        clock.now += 10 if event is due else 5

    tell = stop.timed(save)
    clock.now += 20
    assert not stop()
    tell(due)
    tell(RunEnded(1, "finished", 1.0, 1.0))  # not a save, however long it takes
    clock.now += 14.9  # 49.9 s, and 10 s for a checkpoint
    assert not stop()
    clock.now += 0.1
    assert stop()
    assert stop.timed_out
    assert stop.signal is None
    assert stop.cause == "by its time limit, `trainer.max_time`"


def test_without_a_limit_time_does_not_matter() -> None:
    clock = Clock()
    stop = StopRequest(Notes(), clock=clock)  # type: ignore[arg-type]  # all that it uses
    clock.now += 1e9
    assert not stop()


def test_nothing_saved_says_why() -> None:
    clock = Clock()
    stop = StopRequest(Notes(), max_seconds=1, clock=clock)  # type: ignore[arg-type]  # as above
    error = stop.nothing_saved()
    assert isinstance(error, Interrupted)
    assert error.signal == signal.SIGINT
    clock.now += 2
    assert stop()
    error = stop.nothing_saved()
    assert isinstance(error, RunFailedError)
    assert error.problems[0].id == "trainer.max-time"

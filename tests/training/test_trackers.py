"""Trackers are passed what is measured, and whatever they do, the run goes on."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lora_cli.errors import UserError
from lora_cli.training import trackers as module
from lora_cli.training.events import EvalDone, Event, RunEnded, RunStarted, StepDone
from lora_cli.training.trackers import Trackers, check_installed
from lora_cli.training.tracking import OPENERS, TrackedRun

EVENTS: list[Event] = [
    RunStarted(0, 4, 2, 16),
    EvalDone(0, {"accuracy": 0.5, "loss": 0.75}, "accuracy", False),
    StepDone(1, 0.5, 0.625, 5e-4, 2.0, 99.5, True),
    StepDone(2, 1.0, 0.5, 4e-4, 2.0, 100.0, False),
    EvalDone(2, {"accuracy": 0.75, "loss": 0.25}, "accuracy", True),
    RunEnded(2, "finished", 3.5, 123.5),
]


class Recorder:
    def __init__(self) -> None:
        self.reports: list[tuple[dict[str, float], int]] = []
        self.has_finished = False

    def log(self, values: dict[str, float], step: int) -> None:
        self.reports.append((values, step))

    def finish(self) -> None:
        self.has_finished = True


def tracked_run(folder: Path) -> TrackedRun:
    return TrackedRun(
        folder=folder, project="p", name="n", config={}, ids={"x": "1"}, remember=lambda *_: None
    )


def fake(
    openers: dict[str, Callable[[TrackedRun], Any]], folder: Path
) -> tuple[Trackers, list[str]]:
    warnings: list[str] = []
    run = tracked_run(folder)
    return Trackers([*openers, *openers], run, warn=warnings.append, openers=openers), warnings


def test_what_is_measured_is_passed_on(tmp_path: Path) -> None:
    one, two = Recorder(), Recorder()
    trackers, warnings = fake({"one": lambda _: one, "two": lambda _: two}, tmp_path)
    for event in EVENTS:
        trackers(event)
    trackers.close()
    assert one.reports == [
        ({"eval/accuracy": 0.5, "eval/loss": 0.75}, 0),
        (
            {
                "train/loss": 0.625,
                "train/lr": 5e-4,
                "train/grad_norm": 2.0,
                "train/samples_per_second": 99.5,
                "train/epoch": 0.5,
            },
            1,
        ),
        ({"eval/accuracy": 0.75, "eval/loss": 0.25}, 2),
    ]
    assert two.reports == one.reports
    assert one.has_finished
    assert warnings == []


def test_nothing_starts_before_the_run_does(tmp_path: Path) -> None:
    trackers, warnings = fake({"one": lambda _: pytest.fail("started")}, tmp_path)
    trackers.close()
    assert warnings == []


def test_two_phases_start_trackers_once(tmp_path: Path) -> None:
    seen: list[TrackedRun] = []
    recorder = Recorder()

    def start(run: TrackedRun) -> Recorder:
        seen.append(run)
        return recorder

    trackers, _ = fake({"one": start}, tmp_path)
    trackers(RunStarted(3, 8, 2, 16))
    trackers(RunStarted(4, 8, 2, 16))
    trackers.close()
    (run,) = seen
    assert (run.last_step, run.is_new, run.ids) == (3, False, {"x": "1"})


def test_a_new_run_does_not_go_on_with_an_old_one(tmp_path: Path) -> None:
    run = tracked_run(tmp_path).resumed_after(0)
    assert run.is_new
    assert run.ids == {}


class Failing(Recorder):
    """Fails at one place; `Exception` or worse."""

    def __init__(self, place: str, error: BaseException) -> None:
        super().__init__()
        self.place, self.error = place, error

    def log(self, values: dict[str, float], step: int) -> None:
        if self.place == "log":
            raise self.error
        super().log(values, step)

    def finish(self) -> None:
        if self.place == "finish":
            raise self.error


@pytest.mark.parametrize("error", [ValueError("no\nserver"), SystemExit(1), KeyboardInterrupt()])
@pytest.mark.parametrize("place", ["start", "log", "finish"])
def test_one_that_fails_is_left_out_with_one_warning(
    place: str, error: BaseException, tmp_path: Path
) -> None:
    sound = Recorder()

    def start(_: TrackedRun) -> Recorder:
        if place == "start":
            raise error
        return Failing(place, error)

    trackers, warnings = fake({"bad": start, "good": lambda _: sound}, tmp_path)
    for event in EVENTS:
        trackers(event)
    trackers.close()
    assert len(sound.reports) == 3
    assert sound.has_finished
    (warning,) = warnings
    assert warning.startswith("tracker=bad is left out from here on: ")
    assert type(error).__name__ in warning
    assert "\n" not in warning


@pytest.fixture
def release() -> Iterator[threading.Event]:
    """Lets hanging threads go at the end of the test."""
    event = threading.Event()
    yield event
    event.set()


@pytest.mark.parametrize("place", ["start", "log", "finish"])
def test_one_that_hangs_does_not_hold_up_the_run(
    place: str, release: threading.Event, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "START_SECONDS", 0.2)
    sound = Recorder()

    class Hanging(Recorder):
        def log(self, values: dict[str, float], step: int) -> None:
            if place == "log":
                release.wait()

        def finish(self) -> None:
            release.wait()

    def start(_: TrackedRun) -> Recorder:
        if place == "start":
            release.wait()
        return Hanging()

    trackers, warnings = fake({"bad": start, "good": lambda _: sound}, tmp_path)
    began = time.monotonic()
    for event in EVENTS:
        trackers(event)
    trackers.close(0.2)
    assert time.monotonic() - began < 2
    assert len(sound.reports) == 3
    (warning,) = warnings
    assert warning.startswith("tracker=bad is left out from here on: it did not ")


def test_one_that_does_not_keep_up_is_left_out(
    release: threading.Event, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_WAITING", 5)

    class Slow(Recorder):
        def log(self, values: dict[str, float], step: int) -> None:
            release.wait()

    trackers, warnings = fake({"slow": lambda _: Slow()}, tmp_path)
    trackers(EVENTS[0])
    for step in range(20):
        trackers(StepDone(step, 0.5, 0.5, 1e-3, 1.0, 10.0, True))
    trackers.close()
    assert warnings == ["tracker=slow is left out from here on: it does not keep up"]


def test_what_they_print_stays_off_stdout(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Chatty(Recorder):
        def finish(self) -> None:
            sys.stdout.write("see https://example.org\n")

    def start(_: TrackedRun) -> Recorder:
        sys.stdout.write("welcome\n")
        return Chatty()

    trackers, _ = fake({"chatty": start}, tmp_path)
    trackers(EVENTS[0])
    sys.stdout.write("ours\n")
    trackers.close()
    assert capsys.readouterr().out == "ours\n"


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    check_installed(["csv"])
    monkeypatch.setattr(
        module.importlib.util, "find_spec", lambda name: None if name == "alembic" else object()
    )
    with pytest.raises(UserError, match=r"mlflow needs alembic") as caught:
        check_installed(["csv", "mlflow", "mlflow"])
    (problem,) = caught.value.problems
    assert problem.fix == 'pip install "lora-cli[tracking]"'


def test_every_tracker_that_can_be_chosen_can_be_started() -> None:
    from lora_cli.config.schema import all_keys, short_type

    key = all_keys("train")["tracker"]
    names = short_type(key.annotation, {}).removeprefix("[").removesuffix(", ...]").split("|")
    assert set(names) == set(OPENERS) == set(module.PACKAGES)

"""What can be told of a run from outside, while it runs and however it ended."""

import json
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from lora_cli.artifacts import run_state
from lora_cli.artifacts.lock import LOCK, locked
from lora_cli.artifacts.run_state import (
    STATUS,
    StatusFile,
    is_held,
    read_standing,
    read_state,
    resume_command,
)
from lora_cli.training.events import (
    CheckpointDue,
    EvalDone,
    EvalProgress,
    EvalStarted,
    Progress,
    RunEnded,
    RunStarted,
    StepDone,
    TrainState,
)

HOLD = """
import sys, time
from pathlib import Path
from lora_cli.artifacts.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@contextmanager
def holder(path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds a run directory."""
    command = [sys.executable, "-c", HOLD, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def step(number: int, *, log: bool = True, speed: float = 50.0) -> StepDone:
    return StepDone(number, number / 4, 0.5, 1e-3, 1.0, speed, log)


def write_result(path: Path, **values: Any) -> None:
    (path / "result.json").write_text(json.dumps(values))


def test_the_file_follows_the_run(tmp_path: Path) -> None:
    clock = Clock()
    status = StatusFile(tmp_path, clock=clock)
    status(step(1))  # not started: nothing to say
    assert not (tmp_path / STATUS).exists()
    status(RunStarted(0, 8, 4, 32))
    status(EvalStarted(0, 10))
    clock.now += 100
    status(EvalProgress(7))
    now = read_standing(tmp_path)
    assert now is not None
    assert (now.phase, now.step, now.total_steps, now.eval_rows) == ("evaluating", 0, 8, 7)
    status(EvalDone(0, {"accuracy": 0.9}, "accuracy", False))
    status(step(1))
    clock.now += 4
    status(step(2))
    clock.now += 2
    status(step(3, log=False, speed=9.0))
    now = read_standing(tmp_path)
    assert now is not None
    # The evaluation before training takes no part: 6 s for two steps.
    assert (now.phase, now.step, now.epoch, now.seconds_per_step) == ("training", 3, 0.75, 3.0)
    assert now.samples_per_second == 50.0
    assert (now.metric, now.best_value, now.best_step) == ("accuracy", None, None)
    status(EvalDone(3, {"accuracy": 0.75}, "accuracy", True))
    status(EvalDone(4, {"accuracy": 0.5}, "accuracy", False))
    status(RunEnded(4, "early stopping", 1.0, 1.0))
    now = read_standing(tmp_path)
    assert now is not None
    assert (now.phase, now.step) == ("trained", 4)
    assert (now.best_value, now.best_step) == (0.75, 3)
    assert now.began == 1000.0


def test_the_file_is_written_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    status = StatusFile(tmp_path, clock=clock)
    status(RunStarted(0, 1000, 4, 32))
    written: list[float] = []
    write = StatusFile._write
    monkeypatch.setattr(
        StatusFile, "_write", lambda self, now: (written.append(clock.now), write(self, now))
    )
    for number in range(1, 101):
        clock.now += 0.1
        status(step(number))
    assert 8 <= len(written) <= 10


def test_a_second_session_keeps_the_best_and_its_own_pace(tmp_path: Path) -> None:
    clock = Clock()
    first = StatusFile(tmp_path, clock=clock)
    first(RunStarted(0, 8, 4, 32))
    first(step(1))
    first(EvalDone(4, {"accuracy": 0.75}, "accuracy", True))
    clock.now += 5000
    second = StatusFile(tmp_path, clock=clock)
    second(RunStarted(4, 8, 4, 32))
    second(step(5))
    clock.now += 2
    second(step(6))
    now = read_standing(tmp_path)
    assert now is not None
    assert (now.best_step, now.seconds_per_step, now.began) == (4, 2.0, 6000.0)
    # A run that starts anew, or before its best step, has no best yet.
    for number in (0, 2):
        other = StatusFile(tmp_path, clock=clock)
        other(RunStarted(number, 8, 4, 32))
        now = read_standing(tmp_path)
        assert now is not None
        assert now.best_step is None


def test_a_second_phase_is_the_same_session(tmp_path: Path) -> None:
    clock = Clock()
    status = StatusFile(tmp_path, clock=clock)
    status(RunStarted(0, 4, 4, 32))
    status(EvalDone(4, {"accuracy": 0.75}, "accuracy", True))
    clock.now += 10
    status(RunStarted(4, 8, 4, 32))
    now = read_standing(tmp_path)
    assert now is not None
    assert (now.began, now.total_steps, now.best_step) == (1000.0, 8, 4)


def test_what_was_held_back_is_written_at_the_end_and_with_each_checkpoint(tmp_path: Path) -> None:
    status = StatusFile(tmp_path, clock=Clock())
    status.flush()
    assert not (tmp_path / STATUS).exists()
    status(RunStarted(0, 8, 4, 32))
    for number, act in (
        (1, lambda: status(CheckpointDue(TrainState(Progress(step=1), {}, {})))),
        (2, status.flush),
    ):
        status(step(number))
        now = read_standing(tmp_path)
        assert now is not None
        assert now.step == number - 1
        act()
        now = read_standing(tmp_path)
        assert now is not None
        assert now.step == number


def test_a_file_that_cannot_be_written_leaves_no_part_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path, text: str, **_: Any) -> int:
        path.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", fail)
    StatusFile(tmp_path)(RunStarted(0, 8, 4, 32))
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_full_does_no_harm(tmp_path: Path) -> None:
    status = StatusFile(tmp_path / "gone")
    status(RunStarted(0, 8, 4, 32))
    assert read_standing(tmp_path / "gone") is None


@pytest.mark.parametrize("text", ["", "{", "[]", '{"step": 1}', '{"began": 1, "what": 2}'])
def test_a_damaged_file_says_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / STATUS).write_text(text)
    assert read_standing(tmp_path) is None


@pytest.mark.parametrize("has_list", [True, False])
def test_looking_does_not_take_the_lock(
    tmp_path: Path, has_list: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not has_list:
        monkeypatch.setattr(run_state, "_LOCKS", tmp_path / "none")
    assert not is_held(tmp_path)
    with holder(tmp_path) as process:
        assert is_held(tmp_path)
        state = read_state(tmp_path)
        assert state.state == "running"
        assert state.holder == f"process {process.pid} on {platform.node()}"
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not is_held(tmp_path)
        assert read_state(tmp_path).state == "crashed"


def test_no_start_is_ever_refused_because_somebody_looks(tmp_path: Path) -> None:
    watcher = os.fork()
    if watcher == 0:
        while True:
            read_state(tmp_path)
    try:
        for _ in range(300):
            with locked(tmp_path):
                pass
    finally:
        os.kill(watcher, signal.SIGKILL)
        os.waitpid(watcher, 0)


def test_a_number_that_another_program_has_now_is_no_holder(tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text(f"process {os.getppid()} on {platform.node()} since today")
    assert not is_held(tmp_path)


def test_the_lock_of_another_machine_says_little(tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text("process 1 on elsewhere since today")
    state = read_state(tmp_path)
    assert state.state == "unknown"
    assert "elsewhere" in str(state.reason)


@pytest.mark.parametrize(
    ("code", "expected"), [(0, "finished"), (75, "stopped"), (1, "failed"), (74, "failed")]
)
def test_a_result_says_how_it_ended(tmp_path: Path, code: int, expected: str) -> None:
    StatusFile(tmp_path)(RunStarted(0, 8, 4, 32))
    write_result(tmp_path, exit_code=code, reason="why", metric={"name": "f1", "value": 0.5})
    for number in (3, 12):
        (tmp_path / "checkpoints" / f"step-{number:08d}").mkdir(parents=True)
    (tmp_path / "checkpoints" / ".tmp-step-00000099-ab").mkdir()
    state = read_state(tmp_path)
    assert (state.state, state.exit_code, state.reason) == (expected, code, "why")
    assert (state.result, state.checkpoint) == (0.5, 12)
    assert state.seconds_left is None


def test_the_result_of_an_earlier_session_does_not_count(tmp_path: Path) -> None:
    write_result(tmp_path, exit_code=75, reason="why")
    os.utime(tmp_path / "result.json", (1000, 1000))
    StatusFile(tmp_path)(RunStarted(4, 8, 4, 32))
    assert read_state(tmp_path).state == "crashed"


def test_the_time_left_follows_from_the_pace(tmp_path: Path) -> None:
    clock = Clock()
    with locked(tmp_path):
        status = StatusFile(tmp_path, clock=clock)
        status(RunStarted(0, 8, 4, 32))
        assert read_state(tmp_path).seconds_left is None
        status(step(1))
        clock.now += 3
        status(step(2))
        assert read_state(tmp_path).seconds_left == pytest.approx(18)


def test_the_command_is_quoted_for_the_shell() -> None:
    command = resume_command(Path("it's here"))
    words = subprocess.run(
        ["sh", "-c", f'for word in {command}; do echo "$word"; done'],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert words[2:] == ["it's here/recipe.yaml", "run.dir=it's here", "--resume"]

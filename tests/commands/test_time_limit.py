"""`trainer.max_time` takes the path of a signal: what is done is saved, and goes on later."""

import json
import re
import shlex
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from lora_cli.commands.stopping import StopRequest
from lora_cli.training.loop import Trainer

WEIGHTS = Path("adapter", "adapter_model.safetensors")


class Clock:
    """A minute for each step."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock, train_step = Clock(), Trainer._train_step

    def step(self: Trainer) -> None:
        train_step(self)
        clock.now += 60

    monkeypatch.setattr(Trainer, "_train_step", step)
    monkeypatch.setattr("lora_cli.commands.train.StopRequest", partial(StopRequest, clock=clock))
    return clock


@pytest.mark.usefixtures("clock")
def test_each_session_takes_so_long_and_the_last_one_finishes(
    tiny_run: Any, run_cli: Any, tmp_path: Path
) -> None:
    settings = [*tiny_run.settings, "trainer.save_steps=4", "trainer.max_time=1m30s"]
    settings.remove("trainer.save_steps=1")
    first = run_cli("train", *settings, "run.dir=a", cwd=tmp_path)
    assert first.code == 75, first.err
    message = "The run was stopped by its time limit, `trainer.max_time`; everything up to step 2"
    assert message in first.err
    assert "\nstopped at step 2 after " in first.err
    assert "on request" not in first.err
    result = json.loads((tmp_path / "a" / "result.json").read_bytes())
    assert result["exit_code"] == 75
    assert result["reason"].startswith(message)
    (command,) = re.findall(r"fix: +lora-cli (.*)", first.err)
    second = run_cli(*shlex.split(command), cwd=tmp_path)
    # The limit passes with the last step, after which nothing is left to stop but evaluations.
    assert second.code == 75, second.err
    third = run_cli(*shlex.split(command), "trainer.max_time=1h", cwd=tmp_path)
    assert third.code == 0, third.err
    assert (tmp_path / "a" / WEIGHTS).read_bytes() == (tiny_run.path / WEIGHTS).read_bytes()


def test_a_limit_that_leaves_no_time_for_a_step_is_an_error(
    tiny_run: Any, run_cli: Any, tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate = Trainer.evaluate

    def slow(self: Trainer) -> Any:
        clock.now += 10
        return evaluate(self)

    monkeypatch.setattr(Trainer, "evaluate", slow)
    done = run_cli("train", *tiny_run.settings, "trainer.max_time=5s", "run.dir=a", cwd=tmp_path)
    assert done.code == 1
    assert (
        "error[trainer.max-time]: `trainer.max_time` must leave time for a first step" in done.err
    )
    assert not (tmp_path / "a").exists()


def test_what_is_no_length_of_time_is_refused(run_cli: Any, tmp_path: Path) -> None:
    done = run_cli("train", "model.path=x", "task.data.path=y", "trainer.max_time=x", cwd=tmp_path)
    assert done.code == 2
    assert '`trainer.max_time` must be a length of time, but is "x".' in done.err

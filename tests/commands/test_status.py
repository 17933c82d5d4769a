"""`lora-cli status`: one run, many runs, and a run that is watched while it trains."""

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from lora_cli.artifacts.lock import locked
from lora_cli.artifacts.run_state import StatusFile, read_state
from lora_cli.commands import status as module
from lora_cli.commands.status import duration
from lora_cli.training.events import EvalDone, RunStarted, StepDone


def facts(text: str) -> dict[str, str]:
    return {line[:12].strip().rstrip(":"): line[12:] for line in text.splitlines()}


def make_run(path: Path, *, result: dict[str, Any] | None = None) -> Path:
    """A run directory at step 3 of 8, whose process is gone unless there is a result."""
    path.mkdir(parents=True)
    for name in ("config.yaml", "environment.json"):
        (path / name).write_text("{}")
    (path / ".lock").write_text(f"process 999999999 on {platform.node()} since then")
    (path / "checkpoints" / "step-00000002").mkdir(parents=True)
    status = StatusFile(path)
    status(RunStarted(0, 8, 4, 32))
    status(StepDone(3, 0.75, 0.5, 1e-3, 1.0, 49.6, True))
    status(EvalDone(3, {"accuracy": 0.75, "loss": 0.5}, "accuracy", True))
    if result is not None:
        (path / "result.json").write_text(json.dumps(result))
    return path


def test_a_finished_run(tiny_run: Any, run_cli: Any) -> None:
    done = run_cli("status", "runs/a", cwd=tiny_run.cwd)
    assert done.code == 0, done.err
    assert done.err == ""
    found = facts(done.out)
    result = json.loads((tiny_run.path / "result.json").read_bytes())
    value = result["metric"]["value"]
    assert found == {
        "run": "runs/a",
        "state": "finished",
        "step": "4 of 4 (100 %), epoch 1.00",
        "speed": found["speed"],
        "best": f"accuracy {value:.4f} at step {result['best_step']}",
        "result": f"{value:.4f}",
        "checkpoint": "step 4",
        "reason": "finished",
    }
    assert found["speed"].endswith(" samples/s while training")
    plain = run_cli("status", "runs/a", "--json", cwd=tiny_run.cwd)
    (line,) = plain.lines
    assert (line["state"], line["step"], line["exit_code"]) == ("finished", 4, 0)
    assert line["resume"] is None


def test_a_run_that_was_killed_says_how_to_go_on(run_cli: Any, tmp_path: Path) -> None:
    make_run(tmp_path / "it's")
    found = facts(run_cli("status", "it's", cwd=tmp_path).out)
    assert found["state"] == "crashed"
    assert found["step"] == "3 of 8 (37 %), epoch 0.75"
    assert found["checkpoint"] == "step 2"
    assert "killed" in found["reason"]
    assert "its disk was full" in found["reason"]
    assert found["last sign"].startswith("20")
    words = shlex.split(found["resume"])
    assert words[-2:] == ["run.dir=it's", "--resume"]


@pytest.mark.parametrize(("code", "state"), [(75, "stopped"), (1, "failed")])
def test_a_run_that_ended_early_says_why(
    run_cli: Any, tmp_path: Path, code: int, state: str
) -> None:
    make_run(tmp_path / "a", result={"exit_code": code, "reason": "Why not."})
    found = facts(run_cli("status", "a", cwd=tmp_path).out)
    assert (found["state"], found["reason"]) == (state, "Why not.")
    assert "resume" in found
    assert "last sign" not in found


@pytest.mark.parametrize("has_adapter", [True, False])
def test_a_run_that_diverged_is_not_resumed(
    run_cli: Any, tmp_path: Path, has_adapter: bool
) -> None:
    result = {"exit_code": 1, "reason": "NaN.", "errors": ["train.not-finite"]}
    path = make_run(tmp_path / "a", result=result)
    if has_adapter:
        (path / "adapter").mkdir()
    found = facts(run_cli("status", "a", cwd=tmp_path).out)
    assert "resume" not in found
    assert "diverge again" in found["fix"]
    assert ("adapter=a" in found["fix"]) == has_adapter
    (line,) = run_cli("status", "a", "--json", cwd=tmp_path).lines
    assert line["resume"] is None


def test_all_runs_of_a_folder(run_cli: Any, tmp_path: Path) -> None:
    make_run(tmp_path / "runs" / "b", result={"exit_code": 0, "reason": "finished"})
    make_run(tmp_path / "runs" / "a")
    (tmp_path / "runs" / ".multirun").mkdir()
    done = run_cli("status", "runs", cwd=tmp_path)
    assert done.code == 0, done.err
    rows = [line.split() for line in done.out.splitlines()]
    assert [row[:2] for row in rows if row[:1] in (["a"], ["b"])] == [
        ["a", "crashed"],
        ["b", "finished"],
    ]
    (line,) = run_cli("status", "runs", "--json", cwd=tmp_path).lines
    assert [(run["path"], run["state"]) for run in line["runs"]] == [
        ("runs/a", "crashed"),
        ("runs/b", "finished"),
    ]


@pytest.mark.parametrize("name", ["none", "empty", "file"])
def test_what_is_no_run_is_an_error(run_cli: Any, tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    done = run_cli("status", name, cwd=tmp_path)
    assert done.code == 2
    assert done.out == ""
    rule = "`from` must be a run directory or a folder of them"
    assert f"error[status.no-run]: {rule}, but {name} is neither." in done.err


def test_quiet_says_nothing(run_cli: Any, tmp_path: Path) -> None:
    make_run(tmp_path / "a")
    done = run_cli("status", "a", "--quiet", cwd=tmp_path)
    assert (done.code, done.out, done.err) == (0, "", "")


def test_watching_ends_with_the_run_and_repeats_only_what_changes(
    run_cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, looks = make_run(tmp_path / "a"), 0

    def sleep(seconds: float) -> None:
        nonlocal looks
        looks += 1
        assert seconds == 0.5
        if looks == 3:
            status(StepDone(4, 1.0, 0.5, 1e-3, 1.0, 50.0, True))
            status(EvalDone(4, {"accuracy": 0.5}, "accuracy", False))
        if looks == 6:
            holding.__exit__(None, None, None)

    monkeypatch.setattr(module.time, "sleep", sleep)
    holding = locked(path)
    with_lock = holding.__enter__()
    assert with_lock is None
    status = StatusFile(path)
    status(RunStarted(3, 8, 4, 32))
    done = run_cli("status", "a", "watch=true", "every=0.5", cwd=tmp_path)
    assert done.code == 0, done.err
    states = [line for line in done.out.splitlines() if line.startswith("state:")]
    assert [line.split()[1].rstrip(",") for line in states] == ["running", "running", "crashed"]
    steps = [line.split()[1] for line in done.out.splitlines() if line.startswith("step:")]
    assert steps == ["3", "4", "4"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, ""),
        (0, "0 s"),
        (59.6, "1 min"),
        (61, "1 min 1 s"),
        (7200, "2 h"),
        (90061, "1 d 1 h"),
        (86400 + 59, "1 d"),
    ],
)
def test_lengths_of_time_have_two_units(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.slow
def test_a_run_in_another_process(tiny_run: Any, tmp_path: Path) -> None:
    others = ("trainer.max_steps", "trainer.eval_steps", "trainer.save_steps")
    settings = [text for text in tiny_run.settings if not text.startswith(others)]
    settings += ["trainer.max_steps=2000", "trainer.eval_steps=500", "trainer.save_steps=20"]
    program = [sys.executable, "-m", "lora_cli"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.Popen(
        [*program, "train", *settings, "run.dir=a"],
        cwd=tmp_path,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        until = time.monotonic() + 60
        while not (tmp_path / "a" / "checkpoints" / "step-00000020").exists():
            assert run.poll() is None, run.communicate()[1]
            assert time.monotonic() < until
            time.sleep(0.1)
        began = time.monotonic()
        shown = subprocess.run(
            [*program, "status", "a"],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        found = facts(shown.stdout)
        assert found["state"].startswith("running, training")
        assert f"process {run.pid} on " in found["state"]
        assert "time left" in found
        assert time.monotonic() - began < 10
        assert run.poll() is None
        run.terminate()
        _, text = run.communicate(timeout=60)
        assert run.returncode == 75, text
    finally:
        run.kill()
        run.wait()
    state = read_state(tmp_path / "a")
    assert state.state == "stopped"
    shutil.rmtree(tmp_path / "a")

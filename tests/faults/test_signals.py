"""Suite 5: every signal in every phase of a run, once and twice.

A run in a forked process sends itself the signal at the moment that a hook marks. Whatever was
committed must verify, the exit code must say what is saved, and the run that goes on afterwards
must end with the bytes of one that was never disturbed.
"""

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest

from lora_cli.artifacts.checkpoint import list_checkpoints
from lora_cli.artifacts.commit import DamagedFolderError, verify_folder

sys.path.insert(0, str(Path(__file__).parent))
from tally import Tally

Patch = pytest.MonkeyPatch
Strike = Callable[[], None]
# What a line of metrics.jsonl says that no two runs have in common.
_TIMED = ("samples_per_second", "crc32")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
SETTINGS = {
    "trainer.max_steps": 4,
    "trainer.global_batch_size": 16,
    "trainer.micro_batch_size": 8,
    "trainer.eval_batch_size": 8,
    "trainer.eval_steps": 2,
    "trainer.save_steps": 2,
    "trainer.log_steps": 1,
}


@dataclass(frozen=True)
class Phase:
    """A moment of a run.

    Attributes:
        target: What is called then.
        count: Which call of it; a call before that does nothing.
        step: Step that is committed if the first signal is followed; None where it is too early,
            or where everything is done.
        is_early: Whether nothing can be saved yet.
    """

    target: str
    count: int = 1
    step: int | None = None
    is_early: bool = False


PHASES = {
    "configuration": Phase("lora_cli.config.jobs.check_config", is_early=True),
    "reading": Phase("lora_cli.commands.preparing._load_inputs", is_early=True),
    "model": Phase("lora_cli.commands.preparing.load_model", is_early=True),
    "tokenising": Phase("lora_cli.commands.preparing.encode_splits", is_early=True),
    "base evaluation": Phase("lora_cli.training.evaluation.move_to", count=2, is_early=True),
    "first forward": Phase("lora_cli.training.loop.seed_step", step=1),
    "accumulation": Phase("lora_cli.training.loop.move_to", count=2 * 2 + 2, step=3),
    "optimizer step": Phase("lora_cli.training.loop.check_finite", count=3, step=3),
    "evaluation": Phase("lora_cli.training.evaluation.move_to", count=4 + 2, step=2),
    "last evaluation": Phase("lora_cli.training.evaluation.move_to", count=8 + 2, step=4),
    "checkpoint": Phase("lora_cli.artifacts.checkpoint.commit_folder", step=2),
    "retention": Phase("lora_cli.artifacts.checkpoint.Checkpointer._remove_old", step=2),
    "best adapter": Phase("lora_cli.commands.session.save_trained", step=2),
    "final evaluation": Phase("lora_cli.training.evaluation.move_to", count=12 + 2, step=4),
    "merging": Phase("lora_cli.commands.finishing.merge_trained", step=4),
    "report": Phase("lora_cli.commands.session.write_findings"),
    "end": Phase("lora_cli.cli.terminal.Terminal.result"),
}
CASES = [(phase, number, times) for phase in PHASES for number in SIGNALS for times in (1, 2)]
# One phase of each kind, each signal a few times; the rest is in the long form.
CORE = [
    ("tokenising", signal.SIGTERM, 1),
    ("base evaluation", signal.SIGINT, 1),
    ("accumulation", signal.SIGUSR1, 1),
    ("evaluation", signal.SIGTERM, 1),
    ("last evaluation", signal.SIGINT, 1),
    ("checkpoint", signal.SIGTERM, 2),
    ("best adapter", signal.SIGINT, 2),
    ("final evaluation", signal.SIGUSR1, 1),
    ("report", signal.SIGTERM, 1),
]


def strike_at(patch: Patch, phase: Phase, strike: Strike) -> None:
    """Call `strike` right before the call that the phase names."""
    owner, _, name = phase.target.rpartition(".")
    holder, calls = resolve_name(owner), 0
    real = getattr(holder, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == phase.count:
            strike()
        return real(*args, **kwargs)

    patch.setattr(holder, name, call)


def start(arguments: list[str], *, cwd: Path, phase: Phase, number: int, times: int) -> int:
    """Run a command line in a forked process that strikes itself, and return the process."""
    child = os.fork()
    if child:
        return child
    code = 99
    try:
        os.chdir(cwd)
        for stream in (1, 2):
            os.dup2(os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
        signal.signal(signal.SIGINT, signal.default_int_handler)
        from lora_cli.cli.main import main

        def strike() -> None:
            Path("struck").write_text(str(time.time()))
            for _ in range(times):
                os.kill(os.getpid(), number)

        with pytest.MonkeyPatch.context() as patch:
            strike_at(patch, phase, strike)
            code = main(arguments)
        sys.stderr.flush()
    finally:
        os._exit(code)


@pytest.fixture(scope="module")
def whole(tiny_run: Any, run_cli: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The settings of all runs, and what one leaves that nobody disturbs."""
    keys = tuple(f"{name}=" for name in SETTINGS)
    settings = [text for text in tiny_run.settings if not text.startswith(keys)]
    settings += [f"{name}={value}" for name, value in SETTINGS.items()]
    cwd = tmp_path_factory.mktemp("whole")
    done = run_cli("train", *settings, "run.dir=a", cwd=cwd)
    assert done.code == 0, done.err
    return settings, left(cwd / "a")


def left(path: Path) -> dict[str, Any]:
    """Return what a run has left that must not depend on how often it was stopped."""
    lines = [json.loads(x) for x in (path / "metrics.jsonl").read_text().splitlines()]
    result = json.loads((path / "result.json").read_bytes())
    steps = list_checkpoints(path / "checkpoints")
    last = steps[max(steps)]
    progress = json.loads((last / "progress.json").read_bytes())
    return {
        "adapter": (path / "adapter" / "adapter_model.safetensors").read_bytes(),
        "predictions": (path / "predictions" / "validation.jsonl").read_bytes(),
        "optimizer": (last / "optimizer.safetensors").read_bytes(),
        "progress": {k: v for k, v in progress.items() if not k.endswith("seconds")},
        "metrics": [{k: v for k, v in x.items() if k not in _TIMED} for x in lines],
        "result": [result[form] for form in ("metric", "base", "adapter", "merged")],
    }


def expected_codes(phase: Phase, number: signal.Signals, times: int) -> set[int]:
    """Return how the process may end; below zero by the signal itself."""
    at_once = 130 if number == signal.SIGINT else -number
    if phase.is_early:
        return {at_once}
    if number == signal.SIGINT and times == 2:
        # With a checkpoint of an earlier step, or when all is done but some files.
        return {130, 75}
    return {0} if phase.step is None else {75}


@pytest.fixture
def trial(whole: Any, run_cli: Any, tmp_path: Path) -> Callable[..., Tally]:
    """Function: one trial, and what it found."""
    settings, expected = whole

    def run(name: str, number: signal.Signals, times: int) -> Tally:
        tally, phase, cwd = (
            Tally("5", trials=1),
            PHASES[name],
            tmp_path / f"{name}-{number}-{times}",
        )
        cwd.mkdir()
        child = start(
            ["train", *settings, "run.dir=a"], cwd=cwd, phase=phase, number=number, times=times
        )
        _, status = os.waitpid(child, 0)
        text, code = (cwd / "output.txt").read_text(), os.waitstatus_to_exitcode(status)
        what = f"{name}, {number.name} x {times}: exit {code}\n{text}"
        assert (cwd / "struck").exists(), what
        waited = time.time() - float((cwd / "struck").read_text())
        assert code in expected_codes(phase, number, times), what
        assert waited < 10, what
        tally.tracebacks += "Traceback" in text
        steps = list_checkpoints(cwd / "a" / "checkpoints")
        for path in steps.values():
            try:
                verify_folder(path)
            except DamagedFolderError:
                tally.lost += 1
        if code == 75:
            assert "error[run.stopped]" in text, what
            tally.lost += not steps
            if times == 1 or number != signal.SIGINT:
                tally.lost += max(steps) != phase.step
        elif code != 0:
            assert not steps, what
            assert "interrupted: nothing new was saved" in text or name == "configuration", what
        again = ["train", *settings, "run.dir=a"]
        if (cwd / "a" / "environment.json").exists():
            again.append("--resume")
        done = run_cli(*again, cwd=cwd)
        assert done.code == 0, what + done.err
        tally.tracebacks += "Traceback" in done.err
        tally.wrong_resumes += left(cwd / "a") != expected
        names = [path.name for path in (cwd / "a").rglob(".tmp-*")]
        assert names == [], what
        shutil.rmtree(cwd)
        return tally

    return run


@pytest.mark.parametrize(("phase", "number", "times"), CORE)
def test_a_signal(
    trial: Callable[..., Tally], phase: str, number: signal.Signals, times: int
) -> None:
    trial(phase, number, times).check()


@pytest.mark.faults
def test_every_signal_in_every_phase(trial: Callable[..., Tally]) -> None:
    found, bad = Tally("5 signals in each phase, once and twice"), []
    for phase, number, times in CASES:
        one = trial(phase, number, times)
        for name in ("trials", "lost", "wrong_resumes", "tracebacks"):
            setattr(found, name, getattr(found, name) + getattr(one, name))
        if one.lost or one.wrong_resumes or one.tracebacks:
            bad.append((phase, number.name, times, one))
    found.report()
    assert bad == []

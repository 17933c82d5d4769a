"""How far a run is, for whoever asks while it runs or afterwards.

The run writes status.json for this. Looking never disturbs it: whether a process holds the run
directory is read from the system's list of locks, since trying the lock would take it for a moment.
"""

import json
import os
import platform
import re
import shlex
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from lora_cli.artifacts.lock import LOCK
from lora_cli.training.events import (
    CheckpointDue,
    EvalDone,
    EvalProgress,
    EvalStarted,
    Event,
    RunEnded,
    RunStarted,
    StepDone,
)

STATUS = "status.json"
# Id of the error of a run that diverged, and would do so again.
NOT_FINITE = "train.not-finite"
State = Literal["running", "finished", "stopped", "failed", "crashed", "unknown"]
_HOLDER = re.compile(r"process (\d+) on (\S+)")
_LOCKS = Path("/proc/locks")
_STOPPED = 75
# Often enough to watch, and too seldom to cost anything.
_WRITE_SECONDS = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Standing:
    """What status.json holds; times are seconds since 1970.

    Attributes:
        began: When this session began.
        updated: When this was written.
        phase: "training", "evaluating" or "trained", when what is left is to evaluate the best.
        step: Optimizer steps done.
        total_steps: Optimizer steps of the whole run.
        epoch: Passes over the rows done.
        seconds_per_step: In this session, evaluations included; None before two steps.
        samples_per_second: While training.
        metric: Name of the selecting metric.
        best_value: Its best value after a step.
        best_step: That step.
        eval_rows: Rows that the evaluation has done.
    """

    began: float
    updated: float
    phase: str = "training"
    step: int = 0
    total_steps: int = 0
    epoch: float = 0.0
    seconds_per_step: float | None = None
    samples_per_second: float | None = None
    metric: str | None = None
    best_value: float | None = None
    best_step: int | None = None
    eval_rows: int = 0


class StatusFile:
    """Listener that keeps status.json of a run directory up to date.

    Args:
        folder: The run directory.
        clock: Seconds since 1970.
    """

    def __init__(self, folder: Path, *, clock: Callable[[], float] = time.time) -> None:
        self._path = folder / STATUS
        self._clock = clock
        self._now: Standing | None = None
        self._written = 0.0
        self._on_disk: Standing | None = None
        self._steps_per_epoch = 1
        # Step and moment that the speed of this session is counted from.
        self._first: tuple[int, float] | None = None

    def __call__(self, event: Event) -> None:
        """Take note of an event, and write now and then."""
        if isinstance(event, RunStarted):
            self._start(event)
        if self._now is None:
            return
        changed = self._after(event, self._now)
        if changed is None:
            return
        self._now = replace(changed, updated=self._clock())
        is_small = isinstance(event, StepDone | EvalProgress)
        if not is_small or self._clock() - self._written >= _WRITE_SECONDS:
            self._write(self._now)

    def flush(self) -> None:
        """Write what has not been written yet, at the end of a session."""
        if self._now is not None and self._now != self._on_disk:
            self._write(self._now)

    def _start(self, event: RunStarted) -> None:
        """Begin a session, or its second phase."""
        now = self._clock()
        before = self._now or read_standing(self._path.parent) or Standing(began=now, updated=now)
        if event.first_step == 0 or (before.best_step or 0) > event.first_step:
            before = Standing(began=now, updated=now)
        self._steps_per_epoch = event.steps_per_epoch
        self._now = replace(
            before,
            began=now if self._now is None else self._now.began,
            phase="training",
            step=event.first_step,
            total_steps=event.total_steps,
            epoch=event.first_step / event.steps_per_epoch,
        )

    def _after(self, event: Event, now: Standing) -> Standing | None:
        match event:
            case RunStarted() | CheckpointDue():
                return now
            case StepDone():
                return self._stepped(event, now)
            case EvalStarted():
                return replace(now, phase="evaluating", eval_rows=0)
            case EvalProgress(rows=rows):
                return replace(now, eval_rows=rows)
            case EvalDone(metrics=metrics, metric=metric, is_best=is_best):
                now = replace(now, phase="training", metric=metric)
                if is_best:
                    now = replace(now, best_value=metrics[metric], best_step=event.step)
                return now
            case RunEnded():
                return replace(now, phase="trained", step=event.step)
        return None

    def _stepped(self, event: StepDone, now: Standing) -> Standing:
        if self._first is None:
            self._first = (event.step, self._clock())
        first, began = self._first
        if event.step > first:
            pace = (self._clock() - began) / (event.step - first)
            now = replace(now, seconds_per_step=pace)
        if event.log:
            now = replace(now, samples_per_second=event.samples_per_second)
        return replace(now, step=event.step, epoch=event.epoch)

    def _write(self, standing: Standing) -> None:
        staged = self._path.with_name(f".tmp-{STATUS}")
        # A full disk is met, and told, where something is written that counts.
        with suppress(OSError):
            staged.write_text(json.dumps(asdict(standing), indent=2) + "\n", encoding="utf-8")
            staged.replace(self._path)
            self._written, self._on_disk = standing.updated, standing
            return
        with suppress(OSError):
            staged.unlink(missing_ok=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class RunState:
    """A run, as it looks from outside.

    Attributes:
        path: The run directory.
        state: "unknown" where another machine may be at work on it.
        reason: Why it ended; None while it runs.
        exit_code: Of a run that has ended by itself.
        holder: Who works on it or did last, such as "process 12 on name".
        checkpoint: Step of the last checkpoint.
        result: Value of the selecting metric that the finished run ended with.
        standing: How far it is; None before training began.
        errors: Ids of what it failed with.
    """

    path: Path
    state: State
    reason: str | None = None
    exit_code: int | None = None
    holder: str | None = None
    checkpoint: int | None = None
    result: float | None = None
    standing: Standing | None = None
    errors: tuple[str, ...] = ()

    @property
    def seconds_left(self) -> float | None:
        """Estimated time to the end of training; None for a run that does not train."""
        now = self.standing
        if self.state != "running" or now is None or now.seconds_per_step is None:
            return None
        return max(now.total_steps - now.step, 0) * now.seconds_per_step


def resume_command(path: Path) -> str:
    """Return the command line that continues a run, quoted for the shell."""
    recipe, directory = shlex.quote(str(path / "recipe.yaml")), shlex.quote(f"run.dir={path}")
    return f"lora-cli train {recipe} {directory} --resume"


def read_state(path: Path) -> RunState:
    """Look at a run directory; nothing in it is changed, locked or verified."""
    standing, result = read_standing(path), _read_json(path / "result.json")
    holder = _read_holder(path)
    text = None if holder is None else f"process {holder[0]} on {holder[1]}"
    # Names alone: whether a checkpoint is sound is found out by whoever uses it.
    steps = [int(x.name[5:]) for x in (path / "checkpoints").glob("step-" + "[0-9]" * 8)]
    found = RunState(
        path=path,
        state="crashed",
        holder=text,
        checkpoint=max(steps, default=None),
        standing=standing,
    )
    if is_held(path):
        return replace(found, state="running")
    if result and (standing is None or _modified(path / "result.json") >= standing.began):
        code = result.get("exit_code")
        state: State = "finished" if code == 0 else "stopped" if code == _STOPPED else "failed"
        value = (result.get("metric") or {}).get("value")
        reason = str(result.get("reason"))
        errors = tuple(map(str, result.get("errors") or ()))
        return replace(
            found, state=state, exit_code=code, reason=reason, result=value, errors=errors
        )
    if holder is not None and holder[1] != platform.node():
        reason = f"it has left no result, and only {holder[1]} knows whether it still runs"
        return replace(found, state="unknown", reason=reason)
    reason = "it left no result: it was killed, the machine went down, or its disk was full"
    return replace(found, reason=reason)


def read_standing(path: Path) -> Standing | None:
    """Return what status.json of a run directory says, or None where it says nothing."""
    try:
        return Standing(**_read_json(path / STATUS))
    except TypeError:
        return None


def is_held(path: Path) -> bool:
    """Whether a process of this machine holds a run directory, found out without trying to."""
    holder = _read_holder(path)
    if holder is None or holder[1] != platform.node():
        return False
    try:
        inode = (path / LOCK).stat().st_ino
        lines = _LOCKS.read_text(encoding="ascii").splitlines()
    except OSError:
        return _is_alive(holder[0])
    # "1: FLOCK ADVISORY WRITE <process> <device>:<inode> 0 EOF"; devices have other numbers there
    # on some file systems.
    for fields in map(str.split, lines):
        found = (fields[1], fields[4], fields[5].rpartition(":")[2])
        if found == ("FLOCK", str(holder[0]), str(inode)):
            return True
    return False


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _read_holder(path: Path) -> tuple[int, str] | None:
    try:
        text = (path / LOCK).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    match = _HOLDER.match(text)
    return None if match is None else (int(match[1]), match[2])


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0

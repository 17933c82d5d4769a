"""`lora-cli train distributed.num_processes=N`: starts the processes, and answers for them.

torch's elastic agent starts, watches and restarts the processes and lets machines find each other.
It makes one exit code of all that can go wrong, so each process leaves a note of how it ended.
"""

import dataclasses
import json
import logging
import os
import signal
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from lora_cli.artifacts.run_state import resume_command
from lora_cli.commands.display import Display
from lora_cli.commands.options import Options
from lora_cli.config.commands import COMMANDS
from lora_cli.config.composed import Composed
from lora_cli.config.decode import decode
from lora_cli.config.distributed import DistributedConfig
from lora_cli.errors import LoraCliError, Problem, RunFailedError, UserError
from lora_cli.ranks import (
    LAUNCH_FOLDER,
    from_record,
    last_line,
    launch_folder,
    note_signal,
    read_notes,
    world_size,
)

JOB, OUTCOME, STARTED = "job.json", "outcome", "started"
# `lora_cli.cli` is above this layer: its worker is started, not imported.
_WORKER = ("-m", "lora_cli.cli.worker")
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
# What the others get, once one process has died, to write down how they ended.
_SHUTDOWN_SECONDS = 2


def must_launch(config: DistributedConfig) -> bool:
    """Tell whether this process has to start those that train.

    Raises:
        UserError: If it is one of several already, and not of as many as the settings ask for.
    """
    if config.world_size == 1:
        return False
    found = world_size()
    if launch_folder() is None and "WORLD_SIZE" not in os.environ:
        return True
    if found != config.world_size:
        raise UserError(
            Problem(
                id="distributed.twice",
                message="`distributed.num_processes` times `distributed.num_nodes` must be the"
                f" {found} that torchrun or accelerate has started, but is {config.world_size}.",
                key="distributed.num_processes",
                fix="leave it out, or start lora-cli without torchrun",
            )
        )
    return False


def launch(composed: Composed, options: Options, display: Display) -> int:
    """Start the processes of a run, wait for them, and return the exit code of the run.

    Signals are passed on to the processes, which then end as a single process would.

    Raises:
        LoraCliError: What a process has met, or that one died, with what it last said.
        KeyboardInterrupt: If the run was interrupted with nothing saved.
    """
    settings: DistributedConfig = composed.config.distributed
    with tempfile.TemporaryDirectory(prefix="lora-cli-") as name:
        folder = Path(name)
        write_job(folder / JOB, composed, options)
        display.note(
            f"starting {settings.num_processes} processes"
            + (f" on each of {settings.num_nodes} machines" if settings.num_nodes > 1 else "")
        )
        agent = _Agent(settings, folder)
        with _passing_on(folder) as signals:
            failures = agent.run(signals)
        return _outcome(folder, failures, signals.received)


def write_job(path: Path, composed: Composed, options: Options) -> None:
    """Write what a worker needs to run one job of `train`."""
    fields = {
        field.name: getattr(composed, field.name)
        for field in dataclasses.fields(composed)
        if field.name != "config"
    }
    job = {"composed": fields, "options": dataclasses.asdict(options)}
    path.write_text(json.dumps(job), encoding="utf-8")


def read_job(path: Path) -> tuple[Composed, Options]:
    """Return what `write_job` has written.

    Raises:
        UserError: If it does not decode, which would be a fault of ours.
    """
    job = json.loads(path.read_bytes())
    fields = job["composed"]
    config, problems = decode(COMMANDS[fields["command"]], fields["plain"])
    if config is None:
        raise UserError(problems)
    return Composed(config=config, **fields), Options(**job["options"])


class _Signals:
    """The signals that this process got, which go on to those that train."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._sent: dict[int, int] = {}
        self._lost_since: float | None = None
        self.received: list[int] = []

    def handle(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        self.received.append(number)
        with suppress(OSError):
            note_signal(self._folder)
        self.pass_on()

    def pass_on(self) -> None:
        """Send what came in to each process that has not got it yet, such as one just started."""
        for note in read_notes(self._folder, STARTED).values():
            pid = note["pid"]
            for number in self.received[self._sent.get(pid, 0) :]:
                try:
                    os.kill(pid, number)
                except ProcessLookupError:
                    break
            self._sent[pid] = len(self.received)

    def end_hung(self) -> None:
        """End the processes that are left a while after another one has missed them.

        The agent asks them to end, and would give them half a minute for it.
        """
        lost = [note for note in read_notes(self._folder, OUTCOME).values() if "lost" in note]
        started = read_notes(self._folder, STARTED).values()
        left = [n for n in started if lost and n["restarts"] == lost[0]["restarts"]]
        if not left:
            self._lost_since = None
            return
        self._lost_since = self._lost_since or time.monotonic()
        if time.monotonic() - self._lost_since > _SHUTDOWN_SECONDS:
            for note in left:
                with suppress(ProcessLookupError):
                    os.kill(note["pid"], signal.SIGKILL)

    def check(self) -> None:
        """Give up where nothing has been started that could end by itself.

        Raises:
            KeyboardInterrupt: If a signal came in.
        """
        if self.received and not read_notes(self._folder, STARTED):
            _end_by(self.received[0])


@contextmanager
def _passing_on(folder: Path) -> Iterator[_Signals]:
    signals = _Signals(folder)
    before = {number: signal.signal(number, signals.handle) for number in _SIGNALS}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Agent:
    """torch's elastic agent, in a thread of its own, since it would take over the signals."""

    def __init__(self, settings: DistributedConfig, folder: Path) -> None:
        self._settings, self._folder = settings, folder
        self._failures: dict[int, Any] = {}
        self._error: Exception | None = None

    def run(self, signals: _Signals) -> dict[int, Any]:
        """Run the processes to their end; return those that died, by rank."""
        thread = threading.Thread(target=self._run, daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(timeout=0.1)
            signals.pass_on()
            signals.end_hung()
            if thread.is_alive():
                signals.check()
        if self._error is not None:
            raise self._error
        return self._failures

    def _run(self) -> None:
        from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
        from torch.distributed.launcher.api import LaunchConfig, elastic_launch

        # It tells at length what is told here in one line.
        logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
        settings = self._settings
        threads = max(1, (os.cpu_count() or 1) // settings.num_processes)
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))
        os.environ[LAUNCH_FOLDER] = str(self._folder)
        is_one = settings.num_nodes == 1
        config = LaunchConfig(
            min_nodes=settings.num_nodes,
            max_nodes=settings.num_nodes,
            nproc_per_node=settings.num_processes,
            run_id=str(uuid.uuid4()) if is_one else settings.rendezvous_id,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0" if is_one else settings.rendezvous or "",
            rdzv_configs={"timeout": int(settings.timeout)},
            max_restarts=settings.max_restarts,
            logs_specs=DefaultLogsSpecs(log_dir=str(self._folder)),
            local_addr="localhost" if is_one else None,
            shutdown_timeout=_SHUTDOWN_SECONDS,
        )
        arguments = [*_WORKER, str(self._folder / JOB)]
        try:
            elastic_launch(config, sys.executable)(*arguments)
        except ChildFailedError as error:
            self._failures = dict(error.failures)
        except Exception as error:  # noqa: BLE001  # raised again in the main thread
            self._error = error
        finally:
            del os.environ[LAUNCH_FOLDER]


def _outcome(folder: Path, failures: Mapping[int, Any], received: list[int]) -> int:
    """Return or raise how the run ended, from the notes of its processes and from their deaths."""
    attempt = max((note["restarts"] for note in read_notes(folder, STARTED).values()), default=0)
    found = read_notes(folder, OUTCOME)
    notes = {rank: note for rank, note in found.items() if note["restarts"] == attempt}
    killed = sorted(
        (failure.timestamp, rank, -failure.exitcode)
        for rank, failure in failures.items()
        if failure.exitcode < 0
    )
    if received and killed and killed[0][2] in received:
        _end_by(killed[0][2])
    hung = [note["lost"][0] for note in notes.values() if note.get("is_hung") and note["lost"]]
    if hung:
        raise _died(folder, hung[0], "did not answer any more")
    if killed:
        _, rank, number = killed[0]
        raise _died(folder, rank, f"was killed by {signal.Signals(number).name}")
    codes = {rank: note["exit_code"] for rank, note in notes.items()}
    failed = [rank for rank, code in codes.items() if code]
    if failed:
        record = notes[failed[0]]
        if record["exit_code"] in (130, 143):
            _end_by(received[0] if received else signal.SIGINT)
        raise from_record(record)
    silent = sorted(rank for rank in failures if rank not in notes)
    if silent:
        rank = silent[0]
        raise _died(folder, rank, f"ended with exit code {failures[rank].exitcode}")
    return 0


def _died(folder: Path, rank: int, how: str) -> LoraCliError:
    line = last_line(folder / f"rank{rank}.log")
    said = f'; its last line: "{line}"' if line else ""
    return RunFailedError(
        Problem(
            id="run.rank-died",
            message=f"Every process must run to the end, but rank {rank} {how}{said}.",
            fix=_how_to_go_on(folder),
        )
    )


def _how_to_go_on(folder: Path) -> str:
    """Return the command that resumes a run whose processes log into its directory."""
    link = next((path for path in sorted(folder.glob("rank*.log")) if path.is_symlink()), None)
    if link is None:
        return "`--resume` goes on from the last checkpoint"
    path, here = link.readlink().parent.parent, Path.cwd()
    return resume_command(path.relative_to(here) if path.is_relative_to(here) else path)


def _end_by(number: int) -> None:
    """End this process by a signal, as if nobody had taken it over.

    Raises:
        KeyboardInterrupt: On Ctrl-C.
    """
    signal.signal(number, signal.SIG_DFL)
    if number != signal.SIGINT:
        signal.raise_signal(number)
    raise KeyboardInterrupt

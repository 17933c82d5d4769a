"""Which process of a run this is, and what processes tell each other through files and text.

Everything here works before torch is imported: a configuration error must be said once, not by
every process.
"""

import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lora_cli.errors import (
    Interrupted,
    LoraCliError,
    Problem,
    RunFailedError,
    StoppedError,
    StorageError,
    UserError,
)

# Set by `lora-cli train distributed.num_processes=N` for the processes that it starts: a folder
# in which they leave their process ids, logs and outcomes.
LAUNCH_FOLDER = "LORA_CLI_LAUNCH_FOLDER"
_SIGNALLED = "signalled"
_KINDS: dict[int, type[LoraCliError]] = {
    kind.exit_code: kind for kind in (RunFailedError, UserError, StorageError, StoppedError)
}


class LostError(RunFailedError):
    """Other processes of the run do not answer any more.

    Attributes:
        ranks: Which; none where that cannot be found out.
        is_hung: Whether they were waited for in vain, rather than gone at once.
    """

    def __init__(self, ranks: Sequence[int], *, timeout: float, is_hung: bool) -> None:
        self.ranks, self.is_hung = tuple(ranks), is_hung
        who = f"rank {', '.join(map(str, ranks))}" if ranks else "one"
        how = f"did not answer for {timeout:g} s" if is_hung else "is gone"
        super().__init__(
            Problem(
                id="run.process-lost",
                message=f"Every process must run to the end, but {who} {how}.",
                fix="see logs/rankN.log of the run directory; `--resume` goes on from the last"
                " checkpoint",
            )
        )


def own_rank() -> int:
    """Return the number of this process among those of the run, 0 for the only one."""
    return int(os.environ.get("RANK", "0")) if world_size() > 1 else 0


def world_size() -> int:
    """Return the number of processes of the run, as whoever started them says."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def was_restarted() -> bool:
    """Return whether these processes take the place of some that died."""
    return restarts() > 0


def restarts() -> int:
    """Return how often the processes were started again after some of them had died."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def launch_folder() -> Path | None:
    """Return where to leave notes for the `lora-cli train` that started this process, if any."""
    folder = os.environ.get(LAUNCH_FOLDER)
    return Path(folder) if folder and own_log_name() else None


def own_log_name() -> str:
    """Return the name of the log of this process; empty for one that runs alone."""
    return f"rank{own_rank()}.log" if world_size() > 1 else ""


def silence() -> None:
    """Send what this process prints into a file, unless it is the one that may print.

    The file is without a name until `log_into` gives it a place, except where the `lora-cli train`
    that started this process reads it.
    """
    if own_rank() == 0:
        return
    folder = launch_folder()
    if folder is not None:
        # Of a process that died there is a link, to what it has said.
        (folder / own_log_name()).unlink(missing_ok=True)
        descriptor = os.open(folder / own_log_name(), os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
    else:
        descriptor, name = tempfile.mkstemp(prefix="lora-cli-")
        Path(name).unlink()
    _redirect(descriptor)
    os.close(descriptor)


def log_into(folder: Path) -> None:
    """Go on with the log of this process in a file of `folder`, with what it holds already."""
    if own_rank() == 0:
        return
    folder.mkdir(parents=True, exist_ok=True)
    path, launched = folder / own_log_name(), launch_folder()
    with path.open("ab", buffering=0) as log:
        # The log of an earlier job of a sweep, which has a place of its own, stays there.
        if launched is not None or os.fstat(2).st_nlink == 0:
            os.lseek(2, 0, os.SEEK_SET)
            with os.fdopen(os.dup(2), "rb") as before:
                shutil.copyfileobj(before, log)
        _redirect(log.fileno())
    if launched is not None:
        link = launched / f".{own_log_name()}"
        link.symlink_to(path.absolute())
        link.replace(launched / own_log_name())


def _redirect(descriptor: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)


def last_line(path: Path) -> str | None:
    """Return the last line of a log that says anything, or None."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    return next((line.strip() for line in reversed(lines) if line.strip()), None)


def as_record(error: BaseException) -> dict[str, Any]:
    """Return an error as plain values, so that another process can raise it."""
    if isinstance(error, LoraCliError):
        problems = [asdict(problem) for problem in error.problems]
        record: dict[str, Any] = {"exit_code": error.exit_code, "problems": problems}
        if isinstance(error, LostError):
            record |= {"lost": list(error.ranks), "is_hung": error.is_hung}
        return record
    if isinstance(error, KeyboardInterrupt):
        number = error.signal if isinstance(error, Interrupted) else signal.SIGINT
        return {"exit_code": 128 + number, "problems": []}
    code = 74 if isinstance(error, OSError) else 70
    message = f"Rank {own_rank()} must go on, but failed: {type(error).__name__}: {error}."
    return {"exit_code": code, "problems": [asdict(Problem(id="run.failed-rank", message=message))]}


def from_record(record: Mapping[str, Any]) -> LoraCliError:
    """Return the error that another process met."""
    problems = [Problem(**problem) for problem in record["problems"]]
    kind = _KINDS.get(record["exit_code"], LoraCliError)
    error = kind(problems)
    error.exit_code = record["exit_code"]
    return error


def write_note(name: str, value: Mapping[str, Any]) -> None:
    """Leave a note for the `lora-cli train` that started this process, if one did."""
    folder = launch_folder()
    if folder is not None:
        staged = folder / f".{name}-{own_rank()}"
        staged.write_text(json.dumps({"restarts": restarts(), **value}), encoding="utf-8")
        staged.replace(folder / f"{name}-{own_rank()}.json")


def note_signal(folder: Path) -> None:
    """Note, for the processes that were started, that somebody has sent a signal."""
    (folder / _SIGNALLED).touch()


def is_signal_ours(number: int) -> bool:
    """Whether a signal is meant for the run, and not the end of the others of one that died."""
    folder = launch_folder()
    return folder is None or number != signal.SIGTERM or (folder / _SIGNALLED).exists()


def read_notes(folder: Path, name: str) -> dict[int, dict[str, Any]]:
    """Return the notes of that name in a folder, by rank; those of dead predecessors left out."""
    found = {}
    for path in folder.glob(f"{name}-*.json"):
        rank = int(path.stem.rpartition("-")[2])
        found[rank] = json.loads(path.read_bytes())
    last = max((note["restarts"] for note in found.values()), default=0)
    return {rank: note for rank, note in sorted(found.items()) if note["restarts"] == last}

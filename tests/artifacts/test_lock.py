"""The lock on a run directory, between processes."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lora_cli.artifacts import lock
from lora_cli.artifacts.lock import check_free, locked
from lora_cli.errors import UserError

HOLD = """
import sys
from pathlib import Path
from lora_cli.artifacts.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_the_lock_holds_between_processes_and_goes_with_the_process(tmp_path: Path) -> None:
    path = tmp_path / "a"
    command = [sys.executable, "-c", HOLD, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(UserError) as caught, locked(path):
            pass
        (problem,) = caught.value.problems
        assert problem.id == "run.locked"
        assert f"in use by process {holder.pid} on " in problem.message
        holder.kill()
    with locked(path):
        assert f"process {os.getpid()} on " in (path / ".lock").read_text()
    with locked(path):
        pass


def test_a_look_at_the_lock_neither_takes_nor_makes_it(tmp_path: Path) -> None:
    check_free(tmp_path / "none")
    assert not (tmp_path / "none").exists()
    path = tmp_path / "a"
    with locked(path):
        text = (path / ".lock").read_text()
        with pytest.raises(UserError, match="in use by process"):
            check_free(path)
        assert (path / ".lock").read_text() == text
    check_free(path)
    with locked(path):
        pass


@pytest.mark.parametrize("text", ["", "process 4194304 on {host} since 2026-01-01 00:00:00"])
def test_a_holder_that_has_not_said_its_name_is_waited_for(tmp_path: Path, text: str) -> None:
    """A process that only looks holds the lock for a moment, and the text is of an earlier one."""
    import fcntl
    import platform
    import threading

    lock = tmp_path / ".lock"
    lock.write_text(text.format(host=platform.node()))
    descriptor = os.open(lock, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    timer = threading.Timer(0.05, os.close, [descriptor])
    timer.start()
    with locked(tmp_path):
        assert f"process {os.getpid()} on " in lock.read_text()
    timer.join()


def test_a_folder_that_was_removed_meanwhile_is_locked_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lock that was waited for is then of a file that is there no more."""
    path, take, taken = tmp_path / "a", lock._take, []

    def late(descriptor: int, *rest: Any) -> None:
        take(descriptor, *rest)
        if not taken:
            shutil.rmtree(path)
        taken.append(descriptor)

    monkeypatch.setattr(lock, "_take", late)
    with locked(path):
        assert len(taken) == 2
        assert f"process {os.getpid()} on " in (path / ".lock").read_text()
        with pytest.raises(UserError, match="in use by process"):
            check_free(path)

"""Suite 12: several processes want one run directory; one gets it, the others are told who has."""

import os
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from lora_cli.artifacts.lock import locked
from lora_cli.errors import UserError

sys.path.insert(0, str(Path(__file__).parent))
from forked import fork_cli, kill_at, run_forked, wait
from tally import Tally


def race(path: Path, *, runners: int) -> list[str]:
    """Let forked processes take the lock at once; return what each says."""
    start = path.with_suffix(".start")
    outputs = [path.with_suffix(f".{number}") for number in range(runners)]
    children = []
    for output in outputs:
        child = os.fork()
        if child == 0:
            text = "crashed"
            try:
                while not start.exists():
                    time.sleep(0.001)
                with locked(path):
                    text = "won"
                    output.write_text(text)
                    # Longer than any of the others may wait for an answer.
                    time.sleep(0.5)
            except UserError as error:
                text = str(error)
            finally:
                output.write_text(text)
                os._exit(0)
        children.append(child)
    start.touch()
    assert [wait(child) for child in children] == [0] * runners
    return [output.read_text() for output in outputs]


@pytest.mark.parametrize(
    ("races", "runners"), [(3, 4), pytest.param(30, 2, marks=pytest.mark.faults)]
)
def test_one_of_several_gets_the_lock(tmp_path: Path, races: int, runners: int) -> None:
    tally = Tally(f"12 {runners} processes at once for a lock")
    for number in range(races):
        said = race(tmp_path / str(number), runners=runners)
        tally.trials += 1
        assert said.count("won") == 1, said
        holder = re.compile(r"in use by process \d+ on \S+ since ")
        assert all(text == "won" or holder.search(text) for text in said), said
    tally.check()


@pytest.mark.faults
def test_one_of_eight_gets_the_lock(tmp_path: Path) -> None:
    test_one_of_several_gets_the_lock(tmp_path, 5, 8)


def hold_on(place: tuple[str, int], flag: Path) -> Any:
    """Return what makes a run wait at a place until `flag` is gone."""
    from forked import at_places

    def act(found: tuple[str, int]) -> None:
        if found == place:
            flag.touch()
            while flag.exists():
                time.sleep(0.01)

    return lambda: at_places(act)


@pytest.mark.faults
@pytest.mark.parametrize("more", [["--resume"], ["--overwrite"], ["trainer.resume=auto"], []])
def test_a_run_in_use_is_left_alone(tiny_run: Any, tmp_path: Path, more: list[str]) -> None:
    tally = Tally("12 a second command while a run trains", trials=1)
    arguments = ["train", *tiny_run.settings, "run.dir=a"]
    flag, output = tmp_path / "flag", tmp_path / "first.txt"
    child = fork_cli(arguments, cwd=tmp_path, output=output, first=hold_on(("committed", 3), flag))
    try:
        for _ in range(600):
            if flag.exists():
                break
            time.sleep(0.05)
        began = time.monotonic()
        code, text = run_forked([*arguments, *more], cwd=tmp_path)
        assert code == 2, text
        assert time.monotonic() - began < 5
        if more:
            assert f"in use by process {child} on " in text, text
            assert "error[run.locked]" in text
        tally.tracebacks += "Traceback" in text
    finally:
        flag.unlink(missing_ok=True)
    assert wait(child) == 0, output.read_text()
    tally.check()


def test_the_lock_of_a_killed_run_is_free(tiny_run: Any, tmp_path: Path) -> None:
    arguments = ["train", *tiny_run.settings, "run.dir=a"]
    code, output = run_forked(arguments, cwd=tmp_path, first=kill_at(("committed", 2)))
    assert code == -signal.SIGKILL, output
    assert (tmp_path / "a" / ".lock").read_text().startswith("process ")
    code, output = run_forked([*arguments, "--resume"], cwd=tmp_path)
    assert code == 0, output

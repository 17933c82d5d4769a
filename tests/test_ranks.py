"""Which process this is, what it prints where, and the notes that processes leave."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lora_cli.errors import Interrupted, LoraCliError, Problem, StorageError, UserError
from lora_cli.ranks import (
    LAUNCH_FOLDER,
    LostError,
    as_record,
    from_record,
    last_line,
    own_rank,
    read_notes,
    restarts,
    was_restarted,
    world_size,
    write_note,
)

TALK = """
import sys
from pathlib import Path
from lora_cli.ranks import log_into, silence
silence()
print("before", flush=True)
if len(sys.argv) > 1:
    log_into(Path(sys.argv[1]))
print("after", file=sys.stderr, flush=True)
"""


def talk(rank: int, *arguments: object, folder: Path | None = None) -> str:
    """Run `TALK` as one of two processes, and return what it prints."""
    variables = {"RANK": str(rank), "WORLD_SIZE": "2"}
    if folder is not None:
        variables[LAUNCH_FOLDER] = str(folder)
    done = subprocess.run(
        [sys.executable, "-c", TALK, *map(str, arguments)],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout + done.stderr


def test_one_process_is_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert (own_rank(), world_size(), was_restarted()) == (0, 1, False)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    assert (own_rank(), world_size(), was_restarted(), restarts()) == (3, 4, True, 2)


def test_only_the_first_prints(tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    assert talk(0, logs) == "before\nafter\n"
    assert not logs.exists()
    assert talk(1) == ""
    assert talk(1, logs) == ""
    assert (logs / "rank1.log").read_text() == "before\nafter\n"


def test_a_launcher_finds_the_log_wherever_it_is(tmp_path: Path) -> None:
    folder, logs = tmp_path / "launch", tmp_path / "logs"
    folder.mkdir()
    assert talk(1, folder=folder) == ""
    assert last_line(folder / "rank1.log") == "after"
    assert talk(1, logs, folder=folder) == ""
    assert (folder / "rank1.log").resolve() == (logs / "rank1.log").resolve()
    first = (logs / "rank1.log").read_text()
    # One that takes the place of another must not copy the log into itself.
    assert talk(1, logs, folder=folder) == ""
    assert (logs / "rank1.log").read_text() == first + "before\nafter\n"


def test_the_last_line_says_something(tmp_path: Path) -> None:
    log = tmp_path / "rank1.log"
    assert last_line(log) is None
    log.write_text("one\ntwo  \n\n \n")
    assert last_line(log) == "two"


@pytest.mark.parametrize("kind", [UserError, StorageError])
def test_an_error_is_the_same_elsewhere(kind: type[LoraCliError]) -> None:
    problem = Problem(id="a.b", message="`a` must be b, but is c.", key="a", fix="b")
    found = from_record(as_record(kind(problem)))
    assert type(found) is kind
    assert found.problems == (problem,)
    assert found.exit_code == kind.exit_code


def test_other_errors_have_exit_codes() -> None:
    assert as_record(KeyboardInterrupt())["exit_code"] == 130
    assert as_record(Interrupted(signal.SIGTERM))["exit_code"] == 143
    assert as_record(OSError("full"))["exit_code"] == 74
    record = as_record(ValueError("odd"))
    assert record["exit_code"] == 70
    assert "ValueError: odd" in str(from_record(record))
    lost = as_record(LostError([1], timeout=5, is_hung=True))
    assert (lost["lost"], lost["is_hung"], lost["exit_code"]) == ([1], True, 1)
    assert "rank 1 did not answer for 5 s" in lost["problems"][0]["message"]


def test_notes_are_those_of_the_last_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv(LAUNCH_FOLDER, raising=False)
    write_note("outcome", {"exit_code": 0})
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv(LAUNCH_FOLDER, str(tmp_path))
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        write_note("outcome", {"exit_code": int(rank)})
    assert read_notes(tmp_path, "outcome")[1] == {"restarts": 0, "exit_code": 1}
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    monkeypatch.setenv("RANK", "0")
    write_note("outcome", {"exit_code": 7})
    assert read_notes(tmp_path, "outcome") == {0: {"restarts": 1, "exit_code": 7}}

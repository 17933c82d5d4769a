"""Whether there is a place and room in it, seen before anything is written."""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from lora_cli.artifacts.room import check_space, find_obstacle, make_room
from lora_cli.errors import StorageError


def test_obstacles_are_found_before_work_begins(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert find_obstacle(tmp_path / "new" / "deep") is None
    assert find_obstacle(tmp_path / "file" / "deep" / "x") == f"{tmp_path / 'file'} is a file"
    assert find_obstacle(Path("/")) is None
    if os.geteuid() != 0:
        (tmp_path / "closed").mkdir(mode=0o500)
        assert find_obstacle(tmp_path / "closed" / "x") is not None


def test_making_room_proves_that_something_can_be_made(tmp_path: Path) -> None:
    make_room(tmp_path / "deep" / "x")
    assert [path.name for path in tmp_path.iterdir()] == ["deep"]
    assert list((tmp_path / "deep").iterdir()) == []
    with pytest.raises(StorageError) as caught:
        make_room(Path("/proc/lora-cli/x"))
    assert caught.value.problems[0].id == "output.unusable"


def test_room_is_set_aside_and_given_back(tmp_path: Path) -> None:
    check_space(tmp_path / "new" / "checkpoints", file_bytes=1_000_000, copies=3)
    assert list(tmp_path.iterdir()) == []


def test_room_for_results_is_asked_for_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(os, "posix_fallocate", lambda _, start, size: asked.append(size - start))
    check_space(tmp_path, file_bytes=100, copies=2, other_bytes=250)
    assert asked == [100, 100, 100, 100, 50]


LIMITED = """
import resource, sys
from pathlib import Path
from lora_cli.artifacts.room import check_space
from lora_cli.errors import StorageError
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
check_space(Path(sys.argv[1]), file_bytes=900_000, copies=3)
try:
    check_space(Path(sys.argv[1]), file_bytes=1_100_000, copies=3)
except StorageError as error:
    print(error.exit_code, error.problems[0].id, error, error.problems[0].fix)
"""


def test_a_limit_that_the_number_of_free_bytes_does_not_tell_is_seen(tmp_path: Path) -> None:
    command = [sys.executable, "-c", LIMITED, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("74 io.no-room `run.dir` must have room for 3.3 MB"), done.stderr
    assert "file too large" in done.stdout
    assert "limit of file size" in done.stdout
    assert "free some space" not in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_an_error_and_other_trouble_is_passed_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def fail(number: int) -> None:
        def fallocate(*_: int) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "posix_fallocate", fallocate)

    fail(number)
    with pytest.raises(StorageError):
        check_space(tmp_path, file_bytes=10, copies=2)
    fail(errno.EIO)
    with pytest.raises(OSError, match="Input/output") as caught:
        check_space(tmp_path, file_bytes=10, copies=2)
    assert not isinstance(caught.value, StorageError)
    # Where nothing can be set aside, the number of free bytes has to do.
    fail(errno.EOPNOTSUPP)
    check_space(tmp_path, file_bytes=10, copies=2)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=5))
    with pytest.raises(StorageError):
        check_space(tmp_path, file_bytes=10, copies=2)
    assert list(tmp_path.iterdir()) == []

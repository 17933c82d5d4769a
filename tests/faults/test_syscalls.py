"""Suites 1, 2 and 10: a process that writes is killed, or lied to, at each of its system calls.

strace counts the calls of one undisturbed process first. Then there is one trial for each call.
"""

import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lora_cli.artifacts.commit import (
    LEFTOVERS,
    DamagedFolderError,
    clean_leftovers,
    verify_folder,
)

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(HERE))
from tally import Tally  # noqa: E402
from writer import SCENARIOS, adapter_files, step_files  # noqa: E402

CALLS = (
    *("mkdir", "openat", "write", "fsync", "rename", "renameat2"),
    *("unlink", "unlinkat", "rmdir", "flock"),
)
ERRORS = ("ENOSPC", "EIO", "EDQUOT", "EACCES", "EINTR")
START = (
    "import sys; sys.path[:0] = sys.argv[1:3]; del sys.argv[1:3]; import writer; "
    "sys.exit(writer.main())"
)
# Without site-packages Python starts in 10 ms.
PYTHON = (sys.executable, "-S", "-E", "-B", "-c", START, str(ROOT), str(HERE))


def run(folder: Path, scenario: str, *strace: str, limit: int | None = None) -> tuple[int, str]:
    folder.mkdir()
    command = [*PYTHON, scenario, str(folder), *([] if limit is None else [str(limit)])]
    tracer = ["strace", "-o", str(folder.with_suffix(".trace")), *strace] if strace else []
    done = subprocess.run(
        [*tracer, *command], capture_output=True, text=True, check=False, timeout=30
    )
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module", autouse=True)
def can_trace() -> None:
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    probe = subprocess.run(["strace", "-o", "/dev/null", "true"], capture_output=True, check=False)
    if probe.returncode != 0:
        pytest.skip("strace may not trace here")


def counted(tmp_path: Path, scenario: str) -> Iterator[tuple[str, int]]:
    """Yield each call that the scenario makes between its markers, by name and number."""
    folder = tmp_path / f"count-{scenario}"
    code, output = run(folder, scenario, "-e", f"trace={','.join(CALLS)},stat,newfstatat")
    assert code == 0, output
    seen: Counter[str] = Counter()
    inside = 0
    for line in folder.with_suffix(".trace").read_text().splitlines():
        name = line.partition("(")[0]
        inside += '"/marker"' in line
        if name in CALLS:
            seen[name] += 1
            if inside == 1:
                yield name, seen[name]
    assert inside == 2
    assert seen["fsync"] > 0


def content(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def merged_files(number: int) -> dict[str, bytes]:
    return {
        "inner/config.json": b"{}%d" % number,
        "model.safetensors": bytes([number]) * 12000,
    }


def is_whole(folder: Path, step: int) -> bool:
    path = folder / "checkpoints" / f"step-{step:08d}"
    try:
        verify_folder(path)
    except DamagedFolderError:
        return False
    return {n: v for n, v in content(path).items() if n != "MANIFEST.json"} == step_files(step)


def state_of(folder: Path, scenario: str) -> str:
    """Return "old", "new" or "wrong" for what is in a folder, without a look at the leftovers."""
    if scenario in ("first", "retention"):
        names = {
            path.name
            for path in (folder / "checkpoints").glob("*")
            if not path.name.startswith(LEFTOVERS)
        }
        whole = {int(name[-8:]) for name in names if is_whole(folder, int(name[-8:]))}
        if len(whole) < len(names) or (scenario == "retention" and not whole >= {2}):
            return "wrong"
        newest = 1 if scenario == "first" else 3
        if newest in whole:
            return "new"
        return "old" if whole == ({1, 2} if scenario == "retention" else set()) else "wrong"
    forms: dict[str, tuple[str, Callable[[int], dict[str, bytes]]]] = {
        "overwrite": ("adapter", adapter_files),
        "merge": ("merged", merged_files),
    }
    if scenario == "file":
        text = (folder / "result.json").read_bytes()
        return {b"old": "old", b"new" * 1000: "new"}.get(text, "wrong")
    name, form = forms[scenario]
    found = content(folder / name)
    return "old" if found == form(1) else "new" if found == form(2) else "wrong"


def leftovers(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.name.startswith(LEFTOVERS)]


def check_next_start(folder: Path) -> None:
    clean_leftovers(folder)
    clean_leftovers(folder / "checkpoints")
    assert leftovers(folder) == []


def trials(tmp_path: Path, *, stride: int) -> Iterator[tuple[str, str, int]]:
    for scenario in SCENARIOS:
        for index, (name, number) in enumerate(counted(tmp_path, scenario)):
            if index % stride == 0:
                yield scenario, name, number


@pytest.mark.parametrize("stride", [pytest.param(1, marks=pytest.mark.faults), 10])
def test_killed_at_every_call(tmp_path: Path, stride: int) -> None:
    tally = Tally("1 SIGKILL at each system call of a commit")
    for count, (scenario, name, number) in enumerate(trials(tmp_path, stride=stride)):
        folder = tmp_path / str(count)
        inject = f"inject={name}:signal=SIGKILL:when={number}"
        code, output = run(folder, scenario, "-e", f"trace={name}", "-e", inject)
        assert code in (-9, 137), (scenario, name, number, output)
        tally.trials += 1
        found = state_of(folder, scenario)
        tally.lost += found == "wrong"
        assert found != "wrong", (scenario, name, number, sorted(content(folder)))
        check_next_start(folder)
        assert state_of(folder, scenario) == found
        shutil.rmtree(folder)
    assert tally.trials >= 130 // stride
    tally.check()


# The long form has a test for each error, which several workers share.
LONG = [pytest.param(1, (error,), marks=pytest.mark.faults) for error in ERRORS]


@pytest.mark.parametrize(("stride", "errors"), [*LONG, (30, ERRORS[:3])])
def test_an_error_of_every_call(tmp_path: Path, stride: int, errors: tuple[str, ...]) -> None:
    tally = Tally("2 an error of each system call of a commit")
    for count, (scenario, name, number) in enumerate(trials(tmp_path, stride=stride)):
        for error in errors:
            folder = tmp_path / f"{count}-{error}"
            inject = f"inject={name}:error={error}:when={number}"
            code, output = run(folder, scenario, "-e", f"trace={name}", "-e", inject)
            tally.trials += 1
            tally.tracebacks += "Traceback" in output
            where = (scenario, name, number, error, output)
            assert code in (0, 74), where
            found = state_of(folder, scenario)
            tally.lost += found == "wrong"
            # What is done is done, but an error may come in the last sync after it.
            assert found == "new" if code == 0 else found in ("old", "new"), where
            # Nothing is left but where deleting itself failed.
            if name not in ("unlink", "unlinkat", "rmdir", "openat"):
                assert leftovers(folder) == [], where
            check_next_start(folder)
            assert state_of(folder, scenario) == found, where
            shutil.rmtree(folder)
    assert tally.trials >= 130 * len(errors) // stride
    tally.check()


@pytest.mark.parametrize("stride", [pytest.param(250, marks=pytest.mark.faults), 3000])
def test_a_limit_of_file_size_at_every_place(tmp_path: Path, stride: int) -> None:
    """A short write and then EFBIG, which needs no strace and no full disk."""
    tally = Tally("2 short write, then EFBIG, at each size")
    for scenario in SCENARIOS:
        for limit in range(0, 12_100, stride):
            folder = tmp_path / f"{scenario}-{limit}"
            code, output = run(folder, scenario, limit=limit)
            tally.trials += 1
            tally.tracebacks += "Traceback" in output
            found = state_of(folder, scenario)
            tally.lost += found == "wrong"
            assert (code, found) in ((0, "new"), (74, "old")), (scenario, limit, output)
            assert leftovers(folder) == []
            shutil.rmtree(folder)
    assert tally.trials >= 5 * (12_000 // stride)
    tally.check()

"""Suite 8: the other files of a run directory, damaged in a run that was killed and is resumed.

They carry no hash, so a changed digit is what they say. But none may end in a traceback, none may
change what is trained, and whoever only looks must get an answer or an error.
"""

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from forked import kill_at, run_forked
from tally import Tally
from test_corruption import DAMAGES

FILES = (
    *("config.yaml", "recipe.yaml", "environment.json"),
    *("metrics.jsonl", "status.json", "trackers.json", "metrics.csv"),
)
# The first eight flips of a bit; a trial is a whole resumed run.
KINDS = [kind for kind in DAMAGES if not kind.startswith("bit flip") or int(kind[9:]) < 8]


@dataclass(frozen=True)
class Killed:
    """A run that was killed after its third checkpoint, and what it would have come to."""

    folder: Path
    arguments: list[str]
    trained: dict[str, bytes]


def trained(run: Path) -> dict[str, bytes]:
    paths = [*(run / "adapter").glob("*.safetensors"), *run.glob("checkpoints/*/*.safetensors")]
    return {str(path.relative_to(run)): path.read_bytes() for path in sorted(paths)}


@pytest.fixture(scope="module")
def killed(tiny_run: Any, tmp_path_factory: pytest.TempPathFactory) -> Killed:
    folder = tmp_path_factory.mktemp("killed")
    arguments = ["train", *tiny_run.settings, "tracker=[csv]", "run.dir=a"]
    code, output = run_forked(arguments, cwd=folder, first=kill_at(("committed", 3)))
    assert code == -9, output
    (folder / "a" / "trackers.json").write_text('{"mlflow": "0123456789abcdef"}\n')
    return Killed(folder, arguments, trained(tiny_run.path))


def check(killed: Killed, cwd: Path, tally: Tally) -> None:
    """Look at a damaged run, resume it, and compare."""
    tally.trials += 1
    code, output = run_forked(["status", "a"], cwd=cwd)
    tally.tracebacks += "Traceback" in output
    assert code in (0, 2), output
    code, output = run_forked([*killed.arguments, "trainer.resume=auto"], cwd=cwd)
    tally.tracebacks += "Traceback" in output
    # With 2 or 74 it says which file is in the way, and has not begun.
    assert code in (0, 2, 74), output
    if code == 0:
        wrong = trained(cwd / "a") != killed.trained
        tally.wrong_resumes += wrong
        assert not wrong, output
    else:
        assert "error[" in output, output
        for name, content in trained(killed.folder / "a").items():
            assert (cwd / "a" / name).read_bytes() == content


CASES = [
    *(pytest.param(name, KINDS, marks=pytest.mark.faults, id=name) for name in FILES),
    *(pytest.param(name, ["half"], id=f"{name} in short") for name in FILES[2:4]),
]


@pytest.mark.parametrize(("name", "kinds"), CASES)
def test_a_damaged_file_of_the_run(
    killed: Killed, tmp_path: Path, name: str, kinds: list[str]
) -> None:
    tally = Tally(f"8 damaged files: run, {name}")
    bad = []
    for kind in kinds:
        cwd = tmp_path / "there"
        shutil.copytree(killed.folder, cwd)
        assert (cwd / "a" / name).is_file()
        DAMAGES[kind](cwd / "a" / name)
        try:
            check(killed, cwd, tally)
        except AssertionError as error:
            bad.append((kind, str(error)[-1500:]))
        shutil.rmtree(cwd)
    for kind, text in bad:
        sys.stdout.write(f"{kind}:\n{text}\n")
    assert [kind for kind, _ in bad] == []
    tally.check()

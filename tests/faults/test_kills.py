"""Suite 4: SIGKILL at every step and phase of a run of 24 steps, which is then resumed.

Three epochs of eight steps, two micro-batches each, an evaluation every four steps and a checkpoint
every two. The resumed run must end with the same bits as one that was left alone.
"""

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lora_cli.artifacts.checkpoint import list_checkpoints

sys.path.insert(0, str(Path(__file__).parent))
from forked import (
    Place,
    committed_steps,
    kill_at,
    no_leftovers,
    outcome,
    places_of,
    run_forked,
)
from tally import Tally


@dataclass(frozen=True)
class Whole:
    """The run that was left alone."""

    arguments: list[str]
    places: list[Place]
    outcome: dict[str, Any]


@pytest.fixture(scope="module")
def whole(tiny_run: Any, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    cwd = tmp_path_factory.mktemp("whole")
    changed = {
        "trainer.max_steps": "24",
        "trainer.global_batch_size": "8",
        "trainer.eval_steps": "4",
        "trainer.save_steps": "2",
        "trainer.log_steps": "3",
        "trainer.log_rows": "true",
    }
    kept = [s for s in tiny_run.settings if s.partition("=")[0] not in changed]
    settings = [*kept, *(f"{name}={value}" for name, value in changed.items())]
    settings += ["trainer.micro_batch_size=4", "trainer.eval_batch_size=16", "run.dir=a"]
    arguments = ["train", *settings]
    places = places_of(arguments, cwd=cwd)
    return Whole(arguments, places, outcome(cwd / "a", cwd / "ids.jsonl"))


def check_resumed(whole: Whole, cwd: Path, place: Place, tally: Tally) -> None:
    """Kill the run at a place, resume it, and compare."""
    ids = cwd / "ids.jsonl"
    ids.touch()
    code, output = run_forked(whole.arguments, cwd=cwd, first=kill_at(place, ids=ids))
    assert code == -9, (place, code, output)
    tally.trials += 1
    run = cwd / "a"
    there = set(list_checkpoints(run / "checkpoints"))
    tally.lost += len(there - committed_steps(run))
    code, output = run_forked(
        [*whole.arguments, "trainer.resume=auto"], cwd=cwd, first=lambda: note_ids(ids)
    )
    tally.tracebacks += "Traceback" in output
    assert code == 0, (place, output)
    # After the last write nothing is left to be resumed, and the comparison below is all.
    if place == whole.places[-1]:
        assert "run is finished already" in output, output
    elif there:
        tally.lost += f"resuming after step {max(there)}" not in output
    assert no_leftovers(run), (place, sorted(run.iterdir()))
    found = outcome(run, ids)
    tally.wrong_resumes += found != whole.outcome
    assert found == whole.outcome, place


def note_ids(ids: Path) -> None:
    from forked import at_places

    at_places(lambda _: None, ids=ids)


# All places in four parts, which several workers share; five of the places in the short form.
PARTS = [pytest.param(first, 4, marks=pytest.mark.faults) for first in range(4)]


@pytest.mark.parametrize(("first", "stride"), [*PARTS, (0, 26)])
def test_killed_anywhere_and_resumed(whole: Whole, tmp_path: Path, first: int, stride: int) -> None:
    tally = Tally("4 SIGKILL at each forward pass and write of a run of 24 steps, then resumed")
    names = {name for name, _ in whole.places}
    assert names == {"forward", "commit", "committed", "rotate", "file", "filed"}
    assert len(whole.places) > 110
    for number, place in enumerate(whole.places[first::stride]):
        cwd = tmp_path / str(number)
        cwd.mkdir()
        check_resumed(whole, cwd, place, tally)
        shutil.rmtree(cwd)
    assert tally.trials >= 110 // stride
    tally.check()


@pytest.mark.faults
def test_killed_again_and_again(whole: Whole, tmp_path: Path) -> None:
    """No session lives for more than 17 forward passes, or 5 writes."""
    tally = Tally("4 a run whose every session is killed")
    for name, life in (("forward", 17), ("committed", 5)):
        cwd = tmp_path / name
        cwd.mkdir()
        ids = cwd / "ids.jsonl"
        ids.touch()
        arguments = [*whole.arguments, "trainer.resume=auto"]
        for _ in range(100):
            code, output = run_forked(arguments, cwd=cwd, first=kill_at((name, life), ids=ids))
            tally.trials += 1
            if code == 0:
                break
            assert code == -9, output
            life += name == "forward"  # one that is too short for a checkpoint would never end
        assert outcome(cwd / "a", ids) == whole.outcome
    tally.check()

"""Suites 6 and 7: two processes of which one dies, hangs or cannot write; other numbers of them.

Processes are forked and find each other as those of torchrun do, through the first of them.
"""

import errno
import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from forked import at_places, kill_at
from pairs import First, nothing, only, run_together
from tally import Tally
from together import Setup, check_after, metrics, note_texts, signal_at, trained

# Places in each of the processes; the second one does not write.
DEATHS = [
    (rank, place)
    for rank, places in (
        (0, [("forward", 2), ("forward", 9), ("commit", 2), ("committed", 3), ("file", 3)]),
        (1, [("forward", 1), ("forward", 3), ("forward", 6), ("forward", 8), ("forward", 16)]),
    )
    for place in places
]
CORE = [DEATHS[2], DEATHS[7]]
TIMEOUT = 4.0


def disturb(setup: Setup, deaths: list[tuple[int, Any]], tally: Tally) -> None:
    for rank, place in deaths:
        firsts = only(rank, kill_at(place))
        pair = run_together(setup.arguments("a"), setup.folder, firsts=firsts, limit=60)
        note_texts(pair, tally)
        assert pair.codes[rank] == -signal.SIGKILL, (rank, place, pair.outputs)
        assert pair.codes[1 - rank] == 1, (rank, place, pair.outputs)
        if rank == 1:
            assert "but rank 1 is gone" in pair.outputs[0]
            assert pair.outputs[0].count("error[") == 1
            result = (setup.folder / "a" / "result.json").read_bytes()
            assert json.loads(result)["exit_code"] == 1
        check_after(setup, "a", tally)
    tally.check()


@pytest.mark.slow
def test_a_process_dies(setup: Setup) -> None:
    disturb(setup, CORE, Tally("6 processes (core)"))


@pytest.mark.faults
@pytest.mark.parametrize("death", DEATHS)
def test_a_process_dies_anywhere(setup: Setup, death: Any) -> None:
    disturb(setup, [death], Tally("6 processes: death"))


@pytest.mark.faults
@pytest.mark.parametrize("rank", [0, 1])
def test_one_process_is_asked_to_stop(setup: Setup, rank: int) -> None:
    tally = Tally("6 processes: stop one")
    for number in (signal.SIGTERM, signal.SIGINT):
        firsts = only(rank, signal_at(number, ("forward", 6)))
        pair = run_together(setup.arguments("a"), setup.folder, firsts=firsts, limit=60)
        note_texts(pair, tally)
        assert pair.codes == [75, 75], pair.outputs
        assert pair.outputs[0].count("error[run.stopped]") == 1
        check_after(setup, "a", tally)
    tally.check()


@pytest.mark.faults
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_hangs(setup: Setup, rank: int) -> None:
    tally = Tally("6 processes: hang")
    firsts = only(rank, signal_at(signal.SIGSTOP, ("forward", 6)))
    arguments = setup.arguments("a", f"distributed.timeout={TIMEOUT}")
    pair = run_together(arguments, setup.folder, firsts=firsts, limit=60)
    note_texts(pair, tally)
    assert pair.stopped == [rank]
    assert pair.codes[1 - rank] == 1, pair.outputs
    assert pair.seconds < TIMEOUT + 5
    if rank == 1:
        assert f"but rank 1 did not answer for {TIMEOUT:g} s" in pair.outputs[0]
    check_after(setup, "a", tally)
    tally.check()


@pytest.mark.faults
def test_only_the_first_process_cannot_commit(setup: Setup) -> None:
    tally = Tally("6 processes: one-sided commit failure")

    def fail() -> None:
        def act(found: Any) -> None:
            if found == ("commit", 3):
                raise OSError(errno.ENOSPC, "No space left on device", "checkpoints")

        at_places(act)

    pair = run_together(setup.arguments("a"), setup.folder, firsts=[fail, nothing], limit=60)
    note_texts(pair, tally)
    assert pair.codes == [74, 74], pair.outputs
    assert pair.outputs[0].count("error[") == 1
    check_after(setup, "a", tally)
    tally.check()


@pytest.mark.faults
@pytest.mark.parametrize("before", [1, 2])
@pytest.mark.parametrize("after", [1, 2])
def test_the_number_of_processes_changes(setup: Setup, before: int, after: int) -> None:
    tally = Tally("7 world size")
    run, ids = setup.folder / "a", setup.folder / "ids.jsonl"
    # The fourth of the 8 steps ends an epoch.
    for step in (1, 3, 4, 6):
        firsts: list[First] = [stop_after(step, ids), *[nothing] * (before - 1)]
        stopped = run_together(setup.arguments("a"), setup.folder, firsts=firsts, limit=60)
        assert stopped.codes == [75] * before, stopped.outputs
        firsts = [stop_after(99, ids), *[nothing] * (after - 1)]
        done = run_together(setup.arguments("a", "--resume"), setup.folder, firsts=firsts, limit=60)
        note_texts(done, tally)
        assert done.codes == [0] * after, done.outputs
        losses = [
            [x["loss"] for x in y if x["event"] == "train"] for y in (metrics(run), setup.metrics)
        ]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
        rows = [json.loads(line) for line in ids.read_text().splitlines()]
        assert rows == expected_rows(), (before, after, step)
        if before == after == 2 and trained(run) != setup.expected:
            tally.wrong_resumes += 1
        shutil.rmtree(run)
        ids.unlink()
    tally.check()


def stop_after(step: int, ids: Path) -> First:
    """Return what asks for a stop within a step, and writes down the rows of each step."""

    def begin() -> None:
        from lora_cli.training import loop

        rows = loop.step_rows

        def noted(*args: Any, **kwargs: Any) -> Any:
            result = rows(*args, **kwargs)
            with ids.open("a") as file:
                file.write(json.dumps([kwargs["step"], list(result[1])]) + "\n")
            if kwargs["step"] == step - 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return result

        pytest.MonkeyPatch().setattr(loop, "step_rows", noted)

    return begin


def expected_rows() -> list[Any]:
    from lora_cli.training.order import step_rows

    made = []
    for step in range(8):
        _, rows = step_rows(64, seed=42, global_batch_size=16, step=step)
        made.append([step, list(rows)])
    return made


@pytest.mark.faults
def test_shares_must_be_equal(setup: Setup) -> None:
    pair = run_together(setup.arguments("a"), setup.folder, firsts=[nothing] * 3, limit=60)
    assert pair.codes == [2, 2, 2]
    assert "multiple of 3" in pair.outputs[0]
    assert not (setup.folder / "a").exists()

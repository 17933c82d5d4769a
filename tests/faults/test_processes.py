"""Suites 6 and 7: two processes of which one dies, hangs or cannot write; other numbers of them.

Processes are forked and find each other as those of torchrun do, through the first of them.
"""

import errno
import json
import os
import shutil
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lora_cli.artifacts.checkpoint import list_checkpoints
from lora_cli.artifacts.commit import DamagedFolderError, verify_folder

sys.path.insert(0, str(Path(__file__).parent))
from forked import at_places, kill_at
from pairs import First, Pair, nothing, only, run_together
from tally import Tally

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


@dataclass
class Setup:
    """A run of two processes to disturb, and what it comes to undisturbed."""

    settings: list[str]
    folder: Path
    expected: dict[str, bytes]
    metrics: list[Any]

    def arguments(self, name: str, *more: str) -> list[str]:
        return ["train", *self.settings, f"run.dir={name}", *more]


def trained(run: Path) -> dict[str, bytes]:
    """Return what must be bit-equal however often a run was disturbed."""
    paths = [run / "adapter" / "adapter_model.safetensors"]
    paths += sorted(run.glob("checkpoints/step-*/*.safetensors"))
    return {str(path.relative_to(run)): path.read_bytes() for path in paths}


def metrics(run: Path) -> list[Any]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("samples_per_second", None)
    return lines


@pytest.fixture(scope="module")
def setup(tiny_run: Any, tmp_path_factory: pytest.TempPathFactory) -> Setup:
    """A base without dropout, so that one process and two can be compared."""
    folder = tmp_path_factory.mktemp("processes")
    base = folder / "base"
    shutil.copytree(tiny_run.base, base)
    config = json.loads((base / "config.json").read_bytes())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (base / "config.json").write_text(json.dumps(config))
    changed = {"model.path": str(base), "lora.dropout": "0.0", "trainer.max_steps": "8"}
    # Two batches of each evaluation for each process.
    changed["trainer.eval_batch_size"] = "8"
    given = dict(setting.split("=", 1) for setting in tiny_run.settings)
    settings = [f"{name}={value}" for name, value in (given | changed).items()]
    made = Setup(settings, folder, {}, [])
    done = run_together(made.arguments("ref"), folder, firsts=[nothing] * 2, limit=60)
    assert done.codes == [0, 0], done.outputs
    assert "training: 64 rows" in done.outputs[0]
    assert done.outputs[1] == ""
    made.expected, made.metrics = trained(folder / "ref"), metrics(folder / "ref")
    return made


@pytest.fixture(autouse=True)
def _alone(setup: Setup) -> None:
    """Start each test without what another one has left."""
    shutil.rmtree(setup.folder / "a", ignore_errors=True)
    (setup.folder / "ids.jsonl").unlink(missing_ok=True)


def check_after(setup: Setup, name: str, tally: Tally) -> None:
    """Whatever was committed verifies, and the run that goes on comes to the same bits."""
    run = setup.folder / name
    for path in list_checkpoints(run / "checkpoints").values():
        try:
            verify_folder(path)
        except DamagedFolderError:
            tally.lost += 1
    flag = "--resume" if (run / "environment.json").exists() else "--overwrite"
    again = run_together(setup.arguments(name, flag), setup.folder, firsts=[nothing] * 2, limit=60)
    if again.codes != [0, 0] or trained(run) != setup.expected or metrics(run) != setup.metrics:
        tally.wrong_resumes += 1
    shutil.rmtree(run)


def note_texts(pair: Pair, tally: Tally) -> None:
    tally.trials += 1
    tally.tracebacks += any("Traceback" in text for text in pair.outputs)


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


def signal_at(number: int, place: Any) -> First:
    def act(found: Any) -> None:
        if found == place:
            os.kill(os.getpid(), number)

    return lambda: at_places(act)


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

"""What two processes do together that other tests do in one: phases, merged starts, trackers."""

import csv
import json
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent))
from forked import run_forked
from pairs import First, nothing, only, run_together
from together import Setup, make_setup, metrics, signal_at, trained

pytestmark = pytest.mark.slow
BOTH: list[First] = [nothing, nothing]


@pytest.fixture(scope="module")
def setup(tiny_run: Any, tmp_path_factory: pytest.TempPathFactory) -> Setup:
    return make_setup(tiny_run, tmp_path_factory.mktemp("features"))


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in metrics(run) if line["event"] == "train"]


def changed(setup: Setup, name: str, *more: str) -> list[str]:
    """Return the command line with some of its settings changed."""
    given = dict(setting.split("=", 1) for setting in setup.arguments(name)[1:])
    given |= dict(setting.split("=", 1) for setting in more)
    return ["train", *(f"{name}={value}" for name, value in given.items())]


def compare(setup: Setup, name: str, *more: str, stop_at: int) -> dict[str, Any]:
    """Run with one process, with two, and with two that are stopped and go on; return the result.

    Two must agree with one to rounding, and a resumed run with an undisturbed one bit for bit.
    """
    folder = setup.folder
    code, output = run_forked(changed(setup, f"{name}-one", *more), cwd=folder)
    assert code == 0, output
    done = run_together(changed(setup, f"{name}-two", *more), folder, firsts=BOTH, limit=90)
    assert done.codes == [0, 0], done.outputs
    assert done.outputs[1] == ""
    one, two = folder / f"{name}-one", folder / f"{name}-two"
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)
    # Sent to the process that does not write.
    firsts = only(1, signal_at(signal.SIGTERM, ("forward", stop_at)))
    arguments = changed(setup, f"{name}-on", *more)
    stopped = run_together(arguments, folder, firsts=firsts, limit=90)
    assert stopped.codes == [75, 75], stopped.outputs
    resumed = run_together([*arguments, "--resume"], folder, firsts=BOTH, limit=90)
    assert resumed.codes == [0, 0], resumed.outputs
    assert trained(folder / f"{name}-on") == trained(two)
    results = [json.loads((run / "result.json").read_bytes()) for run in (one, two)]
    for form in ("base", "adapter", "merged"):
        assert results[1][form] == pytest.approx(results[0][form], rel=1e-3, abs=1e-6)
    found: dict[str, Any] = results[1]
    return found


def test_a_start_that_is_merged(setup: Setup) -> None:
    more = (f"adapter={setup.folder / 'ref'}", "adapter_mode=merge")
    compare(setup, "merge", *more, stop_at=8)
    bases = [
        load_file(setup.folder / name / "base" / "model.safetensors")
        for name in ("merge-one", "merge-two")
    ]
    assert bases[0].keys() == bases[1].keys()
    assert all(torch.equal(bases[0][name], bases[1][name]) for name in bases[0])


# In the first phase, and in the second.
@pytest.mark.parametrize("stop_at", [4, 12])
def test_two_phases(setup: Setup, stop_at: int) -> None:
    more = ("strategy=lora_then_full", "trainer.max_steps=3", "strategy.full_lr=1e-3")
    result = compare(setup, f"phases{stop_at}", *more, stop_at=stop_at)
    assert [phase["steps"] for phase in result["phases"]] == [3, 4]


def test_trackers_are_told_once(setup: Setup) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = setup.folder / "tracked"
    arguments = changed(setup, "tracked", "tracker=[csv,tensorboard]", "trainer.log_steps=1")
    done = run_together(arguments, setup.folder, firsts=BOTH, limit=90)
    assert done.codes == [0, 0], done.outputs
    assert trained(run) == setup.expected
    with (run / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    steps = [int(row["step"]) for row in rows if row["train/loss"]]
    assert steps == list(range(1, 9))
    seen = EventAccumulator(str(run / "tensorboard")).Reload()
    assert [event.step for event in seen.Scalars("train/loss")] == list(range(1, 9))


@pytest.mark.parametrize("rank", [0, 1])
def test_memory_that_runs_out_in_one_process(setup: Setup, rank: int) -> None:
    def begin() -> None:
        from transformers import BertModel

        forward = BertModel.forward

        def limited(self: Any, input_ids: Any = None, **inputs: Any) -> Any:
            if self.training and len(input_ids) > 2:
                raise MemoryError
            return forward(self, input_ids=input_ids, **inputs)

        pytest.MonkeyPatch().setattr(BertModel, "forward", limited)

    shutil.rmtree(setup.folder / "less", ignore_errors=True)
    run = setup.folder / "less"
    arguments = setup.arguments("less", "trainer.auto_micro_batch=true")
    done = run_together(arguments, setup.folder, firsts=only(rank, begin), limit=90)
    assert done.codes == [0, 0], done.outputs
    lines = metrics(run)
    halved = [line for line in lines if line["event"] == "batch-halved"]
    # From the 8 rows of a process to 4, and to 2.
    assert [line["rows"] for line in halved] == [4, 2]
    assert losses(run) == pytest.approx(
        [line["loss"] for line in setup.metrics if line["event"] == "train"], rel=1e-5
    )
    assert json.loads((run / "result.json").read_bytes())["micro_batch_size"] == 2

"""A run of two processes that other tests disturb, and how they look at what became of it."""

import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_cli.artifacts.checkpoint import list_checkpoints
from lora_cli.artifacts.commit import DamagedFolderError, verify_folder

sys.path.insert(0, str(Path(__file__).parent))
from forked import at_places
from pairs import First, Pair, nothing, run_together
from tally import Tally


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
    paths = sorted(run.glob("adapter/*.safetensors"))
    assert paths
    paths += [*sorted(run.glob("checkpoints/step-*/*.safetensors")), run / "rows.jsonl"]
    return {str(path.relative_to(run)): path.read_bytes() for path in paths}


def metrics(run: Path) -> list[Any]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        for name in ("samples_per_second", "crc32"):
            line.pop(name, None)
    return lines


def make_setup(tiny_run: Any, folder: Path, *more: str) -> Setup:
    """A base without dropout, so that one process and two can be compared."""
    base = folder / "base"
    shutil.copytree(tiny_run.base, base)
    config = json.loads((base / "config.json").read_bytes())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (base / "config.json").write_text(json.dumps(config))
    changed = {"model.path": str(base), "lora.dropout": "0.0", "trainer.max_steps": "8"}
    # Two batches of each evaluation for each process.
    changed["trainer.eval_batch_size"] = "8"
    changed |= {"trainer.log_rows": "true", "trainer.log_steps": "3"}
    given = dict(setting.split("=", 1) for setting in (*tiny_run.settings, *more))
    settings = [f"{name}={value}" for name, value in (given | changed).items()]
    made = Setup(settings, folder, {}, [])
    done = run_together(made.arguments("ref"), folder, firsts=[nothing] * 2, limit=60)
    assert done.codes == [0, 0], done.outputs
    assert "training: 64 rows" in done.outputs[0]
    assert done.outputs[1] == ""
    made.expected, made.metrics = trained(folder / "ref"), metrics(folder / "ref")
    return made


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


def signal_at(number: int, place: Any) -> First:
    """Return what sends a signal to the process at a place of its run."""

    def act(found: Any) -> None:
        if found == place:
            os.kill(os.getpid(), number)

    return lambda: at_places(act)

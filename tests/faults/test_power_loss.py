"""Suite 3: the power goes at any operation, and takes with it any of what was not synced."""

import json
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from lora_cli.artifacts.commit import (
    LEFTOVERS,
    DamagedFolderError,
    clean_leftovers,
    commit_folder,
    make_folders,
    remove_folder,
    replace_file,
    sync_path,
    verify_folder,
)

sys.path.insert(0, str(Path(__file__).parent))
from power import Disk, Op, promise, recording, ways_to_lose
from tally import Tally


@pytest.fixture
def memory_path(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: thousands of states of a disk are written."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


SUITE = "3 power cut at each operation, unsynced writes kept, lost, cut or reordered"


def adapter_files(step: int) -> dict[str, bytes]:
    return {"adapter_model.safetensors": bytes([step]) * 90, "lora_cli.json": b"%d" % step}


def record_run(folder: Path) -> list[Op]:
    """Write what a run of four saved steps writes, in its order, and note what must last."""
    with recording(folder) as ops:
        run = folder / "run"
        make_folders(run)
        replace_file_noted(ops, folder, "run/config.yaml", b"config")
        promise(ops, "config")
        with (run / "metrics.jsonl").open("xb"):
            ops.append(Op("write", "run/metrics.jsonl"))
        for step in (1, 2, 3, 4):
            if step != 3:
                commit_folder(run / "adapter", adapter_files(step), facts={}, manifest=False)
                promise(ops, f"adapter {step}")
            line = json.dumps({"step": step}).encode() + b"\n"
            with (run / "metrics.jsonl").open("ab") as file:
                file.write(line)
            ops.append(Op("append", "run/metrics.jsonl", data=line))
            sync_path(run / "metrics.jsonl")
            target = run / "checkpoints" / f"step-{step:08d}"
            files = {"adapter": bytes([step]) * 50, "progress.json": b"{}"}
            commit_folder(target, files, facts={"step": step})
            promise(ops, f"checkpoint {step}")
            if step > 2:
                promise(ops, f"removing {step - 2}")
                remove_folder(run / "checkpoints" / f"step-{step - 2:08d}")
        replace_file_noted(ops, folder, "run/result.json", b"result")
        promise(ops, "result")
    return ops


def replace_file_noted(ops: list[Op], folder: Path, name: str, data: bytes) -> None:
    """Replace a file, and note the write, which goes through an open file that nobody watches."""
    start = len(ops)
    replace_file(folder / name, data)
    staged = next(op.path for op in ops[start:] if op.kind == "fsync")
    ops.insert(start, Op("write", staged, data=data))


def faults_of(folder: Path, promised: list[str]) -> list[str]:
    """Return what is wrong with what a power cut has left, after the next start."""
    run, faults = folder / "run", []
    if run.is_dir():
        clean_leftovers(run)
        clean_leftovers(run / "checkpoints")
    committed = {int(text.split()[1]) for text in promised if text.startswith("checkpoint")}
    removed = {int(text.split()[1]) for text in promised if text.startswith("removing")}
    whole = set()
    for path in (run / "checkpoints").glob("step-*"):
        try:
            verify_folder(path)
            whole.add(int(path.name[-8:]))
        except DamagedFolderError as error:
            faults.append(f"{path.name}: {error}")
    faults += [f"checkpoint {step} is lost" for step in committed - removed - whole]
    faults += ["metrics are lost"] * (_metrics(run) < max(committed, default=0))
    adapters = [int(text.split()[1]) for text in promised if text.startswith("adapter")]
    now = _adapter(run / "adapter")
    if now == -1 or (adapters and now < adapters[-1]):
        faults.append(f"the adapter is {now}")
    for name in ("config", "result"):
        path = next(iter(run.glob(f"{name}.*")), None)
        if path is None and name in promised:
            faults.append(f"{name} is lost")
        elif path is not None and path.read_text() != name:
            faults.append(f"{name} is damaged")
    faults += [str(path) for path in run.rglob("*") if path.name.startswith(LEFTOVERS)]
    return faults


def _metrics(run: Path) -> int:
    path = run / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n") if path.exists() else [b""]
    steps = [json.loads(line)["step"] for line in lines[:-1]]
    assert steps == list(range(1, len(steps) + 1))
    return len(steps)


def _adapter(folder: Path) -> int:
    """Return which adapter is there as a whole, 0 for none, -1 for a damaged one."""
    if not folder.exists():
        return 0
    found = {path.name: path.read_bytes() for path in folder.iterdir()}
    return next((step for step in (1, 2, 4) if found == adapter_files(step)), -1)


def replay(
    ops: list[Op], memory_path: Path, *, subsets: int, at_most: int = 10**9
) -> tuple[int, int]:
    """Cut the power after each operation in each way; return the trials and the faulty ones."""
    trials = faulty = 0
    disk, promised = Disk(), []
    for number in range(len(ops) + 1):
        for keep, cut in ways_to_lose(number, subsets=subsets):
            place = memory_path / "left"
            disk.write_to(place, keep, random.Random(number), cut=cut)
            trials += 1
            faulty += bool(faults_of(place, promised))
            shutil.rmtree(place)
            if faulty >= at_most:
                return trials, faulty
        if number < len(ops):
            op = ops[number]
            promised += [op.path] if op.kind == "note" else []
            disk.apply(number, op)
    return trials, faulty


def test_the_recorder_sees_what_was_written(memory_path: Path) -> None:
    (memory_path / "real").mkdir()
    ops = record_run(memory_path / "real")
    disk = Disk()
    for number, op in enumerate(ops):
        disk.apply(number, op)
    disk.write_to(memory_path / "copy", lambda _: True, random.Random(0), cut=False)

    def content(folder: Path) -> dict[str, bytes]:
        files = (path for path in folder.rglob("*") if path.is_file())
        return {str(path.relative_to(folder)): path.read_bytes() for path in files}

    assert content(memory_path / "copy") == content(memory_path / "real")
    assert len(content(memory_path / "real")) == 11
    assert {"fsync", "rename", "swap", "delete"} <= {op.kind for op in ops}


@pytest.mark.parametrize("subsets", [pytest.param(12, marks=pytest.mark.faults), 1])
def test_a_power_cut_at_every_operation(memory_path: Path, subsets: int) -> None:
    (memory_path / "real").mkdir()
    trials, faulty = replay(record_run(memory_path / "real"), memory_path, subsets=subsets)
    assert trials > 100 * (3 + subsets)
    Tally(SUITE, trials=trials, lost=faulty).check()


def without(ops: list[Op], number: int) -> list[Op]:
    return ops[:number] + ops[number + 1 :]


def too_early(ops: list[Op], number: int) -> list[Op]:
    """Move a renaming before the syncs that must come first."""
    start = number
    while start > 0 and ops[start - 1].kind == "fsync":
        start -= 1
    return [*ops[:start], ops[number], *ops[start:number], *ops[number + 1 :]]


@pytest.mark.faults
def test_each_sync_and_the_order_of_each_renaming_are_needed(memory_path: Path) -> None:
    """The suite must go red when any of them is taken out of what was recorded."""
    (memory_path / "real").mkdir()
    ops = record_run(memory_path / "real")
    tally = Tally("3 the same with each sync left out, each renaming too early")
    survivors = []
    for number, op in enumerate(ops):
        if op.kind not in ("fsync", "rename", "swap") or ".trash-" in op.other:
            continue
        mutant = without(ops, number) if op.kind == "fsync" else too_early(ops, number)
        if mutant == ops:
            continue
        _, faulty = replay(mutant, memory_path, subsets=8, at_most=1)
        tally.mutants += 1
        tally.killed += faulty > 0
        survivors += [] if faulty else [(number, op.kind, op.path, op.other)]
    assert survivors == []
    assert tally.mutants > 40
    tally.check()

"""Errors that a command line alone does not bring about, as printed.

The texts are in fault_texts.txt, one block a case. After a change on purpose:
UPDATE_SNAPSHOTS=1 python -m pytest tests/contract/test_fault_texts.py
"""

import errno
import importlib.util
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import nn

from lora_cli import ranks
from lora_cli.artifacts.room import check_space
from lora_cli.cli.render import layout_all
from lora_cli.commands import launching
from lora_cli.commands.failing import add_what_is_saved
from lora_cli.commands.restoring import storage_error
from lora_cli.commands.stopping import StopRequest
from lora_cli.errors import LoraCliError
from lora_cli.training.averages import build_averages
from lora_cli.training.memory import memory_checked
from lora_cli.training.noise import check_noise
from lora_cli.training.optim import check_optimizer
from lora_cli.training.recompute import check_recompute
from lora_cli.training.trackers import check_installed

SNAPSHOT = Path(__file__).with_name("fault_texts.txt")
RULER = "=" * 88


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def late() -> StopRequest:
    """Return a request of a session whose second is over."""
    clock, display = Clock(), cast("Any", None)
    stop = StopRequest(display, max_seconds=1, clock=clock)
    clock.now = 2
    assert stop()
    return stop


@contextmanager
def small_files(limit: int) -> Iterator[None]:
    """No file can grow beyond a size; the signal that comes with it is ignored by Python."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def no_room(folder: Path) -> None:
    with small_files(1000):
        check_space(folder, file_bytes=1_500_000, copies=4)


def with_run(folder: Path) -> Path:
    for step in (2, 4):
        (folder / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
    return folder


def disk_full(folder: Path) -> None:
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder / "metrics.jsonl"))
    raise storage_error(with_run(folder), error)


def out_of_memory(folder: Path) -> None:
    try:
        with memory_checked(16, "training"):
            raise MemoryError
    except LoraCliError as error:
        add_what_is_saved(error, with_run(folder))
        raise


def dead_rank(folder: Path) -> None:
    (folder / "rank1.log").write_text("step 3/12  loss 0.5\n\n")
    raise launching._died(folder, 1, "was killed by SIGKILL")


def no_average(folder: Path) -> None:
    named = dict(nn.Linear(2, 2).named_parameters())
    optimizer = torch.optim.SGD(named.values())
    build_averages(0.9, optimizer=optimizer, parameters=named).load_state({})


def raised(error: BaseException) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        raise error

    return act


CAUSES: dict[str, Callable[[Path], Any]] = {
    "disk full in a run": disk_full,
    "no room for checkpoints": no_room,
    "time limit before a first step": lambda here: raised(late().nothing_saved())(here),
    "time limit without a further step": lambda here: raised(late().nothing_new(20))(here),
    "out of memory": out_of_memory,
    "checkpoint without averages": no_average,
    "noise without an embedding": lambda _: check_noise(nn.Linear(2, 2)),
    "recomputing what cannot": lambda _: check_recompute(nn.Linear(2, 2)),
    "process that does not answer": raised(ranks.LostError([1], timeout=30, is_hung=True)),
    "process that is gone": raised(ranks.LostError([], timeout=30, is_hung=False)),
    "process that was killed": dead_rank,
    "process with a bug": raised(ranks.from_record(ranks.as_record(ValueError("x is 3")))),
}
CODES = {
    "disk full in a run": 74,
    "no room for checkpoints": 74,
    "process with a bug": 70,
    "checkpoint without averages": 2,
    "noise without an embedding": 2,
    "recomputing what cannot": 2,
}
MISSING: dict[str, Callable[[], None]] = {
    "optimizer that is not installed": lambda: check_optimizer("lion"),
    "trackers that are not installed": lambda: check_installed(["csv", "tensorboard", "wandb"]),
}


def block(case: str, text: str) -> str:
    return f"{RULER}\n{case}\n\n{text.rstrip()}\n\n"


def read_snapshot() -> dict[str, str]:
    if not SNAPSHOT.exists():
        return {}
    parts = SNAPSHOT.read_text(encoding="utf-8").split(f"{RULER}\n")[1:]
    return {part.split("\n", 1)[0]: f"{RULER}\n{part}" for part in parts}


def compare(case: str, text: str) -> None:
    found, blocks = block(case, text), read_snapshot()
    if os.environ.get("UPDATE_SNAPSHOTS"):
        blocks[case] = found
        ordered = [blocks[name] for name in NAMES if name in blocks]
        SNAPSHOT.write_text("".join(ordered), encoding="utf-8")
    assert found == read_snapshot().get(case)


@pytest.mark.parametrize("case", CAUSES)
def test_the_text_is_as_pinned(case: str, tmp_path: Path) -> None:
    with pytest.raises(LoraCliError) as caught:
        CAUSES[case](tmp_path)
    assert caught.value.exit_code == CODES.get(case, 1)
    compare(case, layout_all(caught.value.problems).replace(str(tmp_path), "HERE"))


@pytest.mark.parametrize("case", MISSING)
def test_the_text_of_what_is_missing(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def find(name: str) -> None:
        return None

    monkeypatch.setattr(importlib.util, "find_spec", find)
    monkeypatch.setattr("lora_cli.training.optim.find_spec", find)
    with pytest.raises(LoraCliError) as caught:
        MISSING[case]()
    assert caught.value.exit_code == 2
    compare(case, layout_all(caught.value.problems))


def test_the_text_of_an_adapter_that_stays_as_it_was(
    tiny_run: Any, run_cli: Any, tmp_path: Path
) -> None:
    settings = [x for x in tiny_run.settings if not x.startswith(("optimizer.lr", "lora.targets"))]
    more = ("optimizer.lr=1e-30", "lora.targets=[query]")
    done = run_cli("train", *settings, *more, "run.dir=a", "--quiet", cwd=tmp_path)
    assert done.code == 1, done.err
    compare("adapter that stays as it was", done.err[done.err.index("error[") :])


NAMES = [*CAUSES, *MISSING, "adapter that stays as it was"]


def test_the_file_holds_these_cases_and_no_others() -> None:
    assert list(read_snapshot()) == NAMES

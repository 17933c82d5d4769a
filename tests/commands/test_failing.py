"""Runs that diverge or run out of memory, through the command line."""

import errno
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lora_cli.commands.failing import add_what_is_saved, refusal_cleared
from lora_cli.errors import Problem, RunFailedError
from lora_cli.tasks.contract import StepOutput
from lora_cli.tasks.single_label import SingleLabelTask

FORWARD = SingleLabelTask.forward


def settings_of(tiny_run: Any, name: str, *more: str) -> list[str]:
    return ["train", *tiny_run.settings, f"run.name={name}", *more]


def limit_rows(monkeypatch: pytest.MonkeyPatch, rows: int, *, first_step: int = 0) -> list[int]:
    """Let batches in training of more rows run out of memory; return the sizes that were tried."""
    tried: list[int] = []

    def limited(self: Any, model: Any, batch: Any) -> StepOutput:
        if model.training:
            tried.append(len(batch["ids"]))
            if len(tried) > first_step and tried[-1] > rows:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return FORWARD(self, model, batch)

    monkeypatch.setattr(SingleLabelTask, "forward", limited)
    return tried


def test_out_of_memory_says_what_to_set_and_the_run_goes_on_with_it(
    tiny_run: Any, tmp_path: Path, run_cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = settings_of(tiny_run, "oom")
    limit_rows(monkeypatch, 8, first_step=2)
    failed = run_cli(*line, cwd=tmp_path)
    assert failed.code == 1
    assert "error[train.out-of-memory]" in failed.err
    assert "set trainer.micro_batch_size=8: 2 micro-batches per step, same gradients" in failed.err
    assert "the checkpoint of step 2 is intact, from where --resume goes on" in failed.err
    result = json.loads((tmp_path / "runs/oom/result.json").read_bytes())
    assert result["exit_code"] == 1

    tried = limit_rows(monkeypatch, 8)
    went_on = run_cli(*line, "trainer.micro_batch_size=8", "--resume", cwd=tmp_path)
    assert went_on.code == 0, went_on.err
    assert tried == [8, 8, 8, 8]
    assert json.loads((tmp_path / "runs/oom/result.json").read_bytes())["steps"] == 4


def test_micro_batches_are_halved_on_request_and_that_is_recorded(
    tiny_run: Any, tmp_path: Path, run_cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit_rows(monkeypatch, 4)
    line = settings_of(tiny_run, "auto", "trainer.auto_micro_batch=true")
    finished = run_cli(*line, cwd=tmp_path)
    assert finished.code == 0, finished.err
    assert "out of memory: micro-batches of 4 rows from here on" in finished.err
    run = tmp_path / "runs/auto"
    lines = [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]
    told = [x for x in lines if x["event"] == "batch-halved"]
    assert [(x["step"], x["kind"], x["rows"]) for x in told] == [(0, "train", 8), (0, "train", 4)]
    assert json.loads((run / "result.json").read_bytes())["micro_batch_size"] == 4
    saved = json.loads((run / "checkpoints/step-00000004/progress.json").read_bytes())
    assert saved["micro_batch_size"] == 4


def test_a_run_that_diverges_leaves_the_last_good_state(
    tiny_run: Any, tmp_path: Path, run_cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def broken(self: Any, model: Any, batch: Any) -> StepOutput:
        output = FORWARD(self, model, batch)
        seen.extend([1] if model.training else [])
        factor = math.nan if model.training and len(seen) == 4 else 1.0
        return StepOutput(output.loss_sum * factor, output.count, output.outputs)

    monkeypatch.setattr(SingleLabelTask, "forward", broken)
    failed = run_cli(*settings_of(tiny_run, "nan"), cwd=tmp_path)
    assert failed.code == 1
    assert "error[train.not-finite]: The loss must be finite, but is not at step 4." in failed.err
    assert "  where:    rows with id " in failed.err
    shown = run_cli("status", "runs/nan", cwd=tmp_path).out
    assert "diverge again" in shown
    assert "--resume" not in shown
    assert "the checkpoint of step 3 is intact" in failed.err
    assert "the best adapter so far is intact, and adapter=runs/nan starts from it" in failed.err
    run = tmp_path / "runs/nan"
    files = [run / "checkpoints/step-00000003/adapter.safetensors", *run.glob("adapter/*.safet*")]
    assert len(files) > 1
    for file in files:
        assert all(bool(torch.isfinite(x).all()) for x in load_file(file).values())
    monkeypatch.setattr(SingleLabelTask, "forward", FORWARD)
    again = run_cli(*settings_of(tiny_run, "on", f"adapter={run}"), cwd=tmp_path)
    assert again.code == 0, again.err


def test_other_errors_are_left_alone(tmp_path: Path) -> None:
    problem = Problem(id="run.other", message="x", fix="y")
    error = RunFailedError(problem)
    add_what_is_saved(error, tmp_path)
    assert error.problems == (problem,)
    bare = RunFailedError(Problem(id="train.not-finite", message="x", fix="y"))
    add_what_is_saved(bare, tmp_path)
    assert bare.problems[0].fix == "y; nothing was saved yet"


def refused(path: Path, *, had_folder: bool = False, is_resumed: bool = False, **more: Any) -> None:
    """Begin a run that is refused, with what it has written so far."""
    (path / more.get("holds", ".")).mkdir(parents=True, exist_ok=True)
    for name in (".lock", "config.yaml", "metrics.jsonl"):
        (path / name).write_text("x")
    clearing = refusal_cleared(path, is_resumed=is_resumed, had_folder=had_folder)
    error = RunFailedError(Problem(id=more.get("id", "io.no-room"), message="x"))
    with pytest.raises(RunFailedError), clearing:
        raise error


def test_a_refused_start_leaves_nothing(tmp_path: Path) -> None:
    refused(tmp_path / "a")
    assert not (tmp_path / "a").exists()
    refused(tmp_path / "b", had_folder=True)
    assert list((tmp_path / "b").iterdir()) == []
    refused(tmp_path / "c", holds="notes")
    # The lock says that what a stranger has put there does not hinder the next start.
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == [".lock", "notes"]


@pytest.mark.parametrize(
    "kept",
    [
        {"is_resumed": True},
        {"id": "train.not-finite"},
        {"holds": "adapter"},
        {"holds": "checkpoints/step-00000001"},
    ],
)
def test_what_may_be_of_value_stays(tmp_path: Path, kept: dict[str, Any]) -> None:
    refused(tmp_path / "a", **kept)
    assert {"config.yaml", "metrics.jsonl"} <= {path.name for path in (tmp_path / "a").iterdir()}


def test_no_room_leaves_no_run_directory(
    tiny_run: Any, tmp_path: Path, run_cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    failed = run_cli(*settings_of(tiny_run, "full"), cwd=tmp_path)
    assert failed.code == 74
    assert "error[io.no-room]" in failed.err
    assert list((tmp_path / "runs").iterdir()) == []

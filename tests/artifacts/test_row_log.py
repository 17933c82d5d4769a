"""rows.jsonl: one line a step, cut back to where a resumed run goes on."""

import json
from pathlib import Path

import pytest

from lora_cli.artifacts.row_log import RowLog
from lora_cli.training.events import CheckpointDue, Progress, RunStarted, StepDone, TrainState


def run(path: Path, *, first: int, last: int, is_on: bool = True) -> None:
    log = RowLog(path, is_on=is_on)
    log(RunStarted(first, last, 4, 64))
    for number in range(first + 1, last + 1):
        # Not every step is reported.
        log(StepDone(number, 0.5, 0.5, 1e-3, 2.0, 100.0, False, [f"{number}a", "\u00e4"]))
        log(CheckpointDue(TrainState(Progress(step=number), {}, {})))


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (path / "rows.jsonl").read_text().splitlines()]


def test_a_resumed_run_repeats_no_line(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    whole.mkdir()
    run(whole, first=0, last=12)
    expected = (whole / "rows.jsonl").read_bytes()
    assert json.loads(expected.splitlines()[11]) == {"step": 12, "ids": ["12a", "\u00e4"]}
    run(tmp_path, first=0, last=7)
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"step": 8, "i')
    run(tmp_path, first=5, last=11)
    # A line without its end is not whole, though it can be read.
    text = (tmp_path / "rows.jsonl").read_bytes()
    (tmp_path / "rows.jsonl").write_bytes(text[:-1])
    run(tmp_path, first=10, last=12)
    assert (tmp_path / "rows.jsonl").read_bytes() == expected
    run(tmp_path, first=0, last=1)
    assert steps(tmp_path) == [1]


def test_off_adds_nothing_but_leaves_nothing_wrong(tmp_path: Path) -> None:
    run(tmp_path, first=0, last=2, is_on=False)
    assert list(tmp_path.iterdir()) == []
    run(tmp_path, first=0, last=6)
    run(tmp_path, first=4, last=8, is_on=False)
    assert steps(tmp_path) == [1, 2, 3, 4]


@pytest.mark.parametrize("damage", [b"{}", b"[3]", b'{"step": "3"}', b"\xff", b"[" * 100000])
def test_what_follows_damage_is_left_out(
    tmp_path: Path, damage: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    run(tmp_path, first=0, last=6)
    lines = (tmp_path / "rows.jsonl").read_bytes().splitlines()
    lines[2] = damage
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    run(tmp_path, first=5, last=6)
    assert steps(tmp_path) == [1, 2, 6]
    assert "rows.jsonl is damaged from line 3 on" in caplog.text

"""What one session writes that no other test looks at: the base apart from the start."""

import json
from pathlib import Path
from typing import Any

import pytest

from lora_cli.training.loop import Trainer
from lora_cli.training.order import step_rows
from lora_cli.training.plan import Plan


def read_lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_base_is_measured_without_the_prefix(
    tiny_run: Any, run_cli: Any, tmp_path: Path
) -> None:
    settings = [s for s in tiny_run.settings if not s.startswith("lora.")]
    done = run_cli(
        "train", *settings, "strategy=prefix", "strategy.num_tokens=4", "run.dir=a", cwd=tmp_path
    )
    assert done.code == 0, done.err
    lines = read_lines(tmp_path / "a" / "metrics.jsonl")
    assert [x["event"] for x in lines[:2]] == ["base", "eval"]
    base = json.loads((tiny_run.path / "result.json").read_bytes())["base"]
    assert lines[0]["metrics"] == base
    # A prefix is no small change: step 0 is not the base.
    assert lines[1]["metrics"]["loss"] != base["loss"]
    result = json.loads((tmp_path / "a" / "result.json").read_bytes())
    assert result["base"] == base
    assert "start" not in result


def test_the_base_is_kept_over_sessions(
    tiny_run: Any, run_cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os
    import signal

    train_step = Trainer._train_step

    def step(self: Trainer) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        train_step(self)

    settings = [s for s in tiny_run.settings if not s.startswith("lora.")]
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_train_step", step)
        stopped = run_cli("train", *settings, "strategy=prefix", "run.dir=a", cwd=tmp_path)
    assert stopped.code == 75, stopped.err
    resumed = run_cli("train", "a/recipe.yaml", "run.dir=a", "--resume", cwd=tmp_path)
    assert resumed.code == 0, resumed.err
    lines = read_lines(tmp_path / "a" / "metrics.jsonl")
    assert [x["event"] for x in lines].count("base") == 1
    result = json.loads((tmp_path / "a" / "result.json").read_bytes())
    assert result["base"] == lines[0]["metrics"]


def test_the_second_phase_sees_the_rows_in_another_order(
    tiny_run: Any, run_cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lora_cli.commands import building

    plans: list[Any] = []

    def plan(**values: Any) -> Plan:
        plans.append(Plan(**values))
        return plans[-1]

    monkeypatch.setattr(building, "Plan", plan)
    settings = [*tiny_run.settings, "strategy=lora_then_full", "strategy.full_lr=1e-3"]
    done = run_cli("train", *settings, "run.dir=a", cwd=tmp_path)
    assert done.code == 0, done.err
    first, second = plans
    assert (first.optimizer.lr, second.optimizer.lr) == (0.01, 1e-3)
    orders = [
        step_rows(64, seed=plan.seed, global_batch_size=16, step=0)[1] for plan in (first, second)
    ]
    assert orders[0] != orders[1]


def test_the_log_of_rows_does_not_depend_on_stops(
    tiny_run: Any, run_cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os
    import signal

    settings = [*tiny_run.settings, "trainer.log_rows=true", "run.dir=a"]
    train_step = Trainer._train_step

    def step(self: Trainer) -> None:
        if self.progress.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        train_step(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_train_step", step)
        assert run_cli("train", *settings, cwd=tmp_path).code == 75
    log = tmp_path / "a" / "rows.jsonl"
    assert len(read_lines(log)) == 3
    # As from a step that was lost.
    with log.open("a") as file:
        file.write('{"step": 4, "ids": ["x"]}\n')
    done = run_cli("train", *settings, "--resume", cwd=tmp_path)
    assert done.code == 0, done.err
    expected = []
    for number in range(4):
        _, rows = step_rows(64, seed=42, global_batch_size=16, step=number)
        expected.append({"step": number + 1, "ids": [str(row + 1) for row in rows]})
    assert read_lines(log) == expected
    # What a run writes may change in between, since it decides nothing.
    settings[-2] = "trainer.log_rows=false"
    again = run_cli("train", *settings, "--resume", cwd=tmp_path)
    assert "run is finished already" in again.err
    assert run_cli("train", *settings, "--overwrite", cwd=tmp_path).code == 0
    assert not log.exists()

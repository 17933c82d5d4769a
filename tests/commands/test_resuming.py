"""Going on with a run: what an interruption says, totals over sessions, which run is meant."""

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from lora_cli.training.loop import Trainer


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def press_ctrl_c(*ignored: Any, times: int = 1) -> None:
    for _ in range(times):
        os.kill(os.getpid(), signal.SIGINT)


def interrupt_after(monkeypatch: pytest.MonkeyPatch, steps: int, *, times: int) -> None:
    train_step = Trainer._train_step

    def step(self: Trainer) -> None:
        if self.progress.step == steps:
            press_ctrl_c(times=times)
        train_step(self)

    monkeypatch.setattr(Trainer, "_train_step", step)


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {str(p.relative_to(folder)): (p.read_bytes(), p.stat().st_mtime_ns) for p in paths}


def test_ctrl_c_twice_keeps_the_checkpoints_and_says_so(
    tiny_run: Any, run_cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3, times=2)
        stopped = run_cli("train", *tiny_run.settings, "run.dir=a", cwd=tmp_path)
    assert stopped.code == 75, stopped.err
    assert "nothing new was saved" not in stopped.err
    assert "everything up to step 3 is saved" in stopped.err
    assert "run.dir=a --resume" in stopped.err
    assert read_json(tmp_path / "a" / "result.json")["exit_code"] == 75
    resumed = run_cli("train", "a/recipe.yaml", "run.dir=a", "--resume", cwd=tmp_path)
    assert resumed.code == 0, resumed.err
    assert "resuming after step 3" in resumed.err


def test_ctrl_c_twice_before_the_first_checkpoint_says_that_nothing_is_saved(
    tiny_run: Any, run_cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt_after(monkeypatch, 0, times=2)
    stopped = run_cli("train", *tiny_run.settings, "run.dir=a", cwd=tmp_path)
    assert (stopped.code, "nothing new was saved" in stopped.err) == (130, True)
    assert not (tmp_path / "a" / "result.json").exists()


def test_ctrl_c_in_the_final_evaluation_says_how_to_go_on(
    tiny_run: Any, run_cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("lora_cli.commands.saving.merge_lora", press_ctrl_c)
        stopped = run_cli("train", *tiny_run.settings, "run.dir=a", cwd=tmp_path)
    assert stopped.code == 75, stopped.err
    assert "everything up to step 4 is saved" in stopped.err
    resumed = run_cli("train", "a/recipe.yaml", "run.dir=a", "--resume", cwd=tmp_path)
    assert resumed.code == 0, resumed.err
    result, whole = (read_json(path / "result.json") for path in (tmp_path / "a", tiny_run.path))
    assert result["adapter"] == whole["adapter"]
    # All four steps were in the first session.
    assert result["samples_per_second"] > 0
    assert result["seconds"] > 0


def test_times_are_totals_over_the_sessions(
    tiny_run: Any, run_cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2, times=1)
        stopped = run_cli("train", *tiny_run.settings, "run.dir=a", cwd=tmp_path)
    assert stopped.code == 75, stopped.err
    path = tmp_path / "a" / "checkpoints" / "step-00000003" / "progress.json"
    progress = read_json(path)
    assert 0 < progress["train_seconds"] < progress["seconds"]
    # As if the first session had taken 1000 seconds, 64 of them in steps.
    slow = json.dumps({**progress, "seconds": 1000.0, "train_seconds": 64.0})
    load = "lora_cli.artifacts.checkpoint.verify_folder"
    manifest = read_json(path.with_name("MANIFEST.json"))
    path.write_text(slow, encoding="utf-8")
    monkeypatch.setattr(load, lambda _: manifest)
    resumed = run_cli("train", "a/recipe.yaml", "run.dir=a", "--resume", cwd=tmp_path)
    assert resumed.code == 0, resumed.err
    result = read_json(tmp_path / "a" / "result.json")
    assert 1000 < result["seconds"] < 1060
    assert 0.9 < result["samples_per_second"] < 1.0


def test_resuming_a_finished_run_changes_nothing(
    tiny_run: Any, run_cli: Any, tmp_path: Path
) -> None:
    shutil.copytree(tiny_run.path, tmp_path / "a")
    before = snapshot(tmp_path / "a")
    arguments = ("train", tmp_path / "a" / "recipe.yaml", "run.dir=a", "--resume")
    done = run_cli(*arguments, "--json", cwd=tmp_path)
    assert done.code == 0, done.err
    assert "run is finished already" in done.err
    assert done.lines == [{"run": "a", **read_json(tiny_run.path / "result.json")}]
    shown = run_cli(*arguments, cwd=tmp_path)
    assert shown.out == tiny_run.finished.out
    assert snapshot(tmp_path / "a") == before


def test_a_run_whose_end_is_missing_is_not_finished(
    tiny_run: Any, run_cli: Any, tmp_path: Path
) -> None:
    """Neither a result that failed nor one of an earlier step counts as the end."""
    whole = read_json(tiny_run.path / "result.json")
    for number, change in enumerate(({"exit_code": 1}, {"steps": 3})):
        path = tmp_path / str(number)
        shutil.copytree(tiny_run.path, path)
        (path / "result.json").write_text(json.dumps({**whole, **change}), encoding="utf-8")
        arguments = ("train", path / "recipe.yaml", f"run.dir={path}", "--resume")
        done = run_cli(*arguments, cwd=tmp_path)
        assert done.code == 0, done.err
        assert "resuming after step 4" in done.err
        assert read_json(path / "result.json")["steps"] == 4


def test_the_result_is_written_last(
    tiny_run: Any, run_cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that a crash cuts off in its last files must not pass for a finished one."""

    def crash(*_: Any) -> None:
        raise RuntimeError

    monkeypatch.setattr("lora_cli.commands.saving.write_report", crash)
    assert run_cli("train", *tiny_run.settings, "run.dir=a", cwd=tmp_path).code == 70
    assert (tmp_path / "a" / "predictions" / "validation.jsonl").exists()
    assert not (tmp_path / "a" / "result.json").exists()


def test_resume_without_a_name_lists_the_unfinished_runs_of_this_configuration(
    tiny_run: Any, run_cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora_cli.commands.train.prepare", lambda *_: pytest.fail("it was loaded"))
    arguments = ("train", tiny_run.path / "recipe.yaml", "--resume")
    none = run_cli(*arguments, cwd=tmp_path)
    assert none.code == 2
    assert "error[run.resume-which]" in none.err
    assert "no unfinished run of this configuration under runs/" in none.err

    ignore = shutil.ignore_patterns("checkpoints", "adapter", "result.json")
    for number in range(7):
        path = tmp_path / "runs" / f"cut-{number}"
        shutil.copytree(tiny_run.path, path, ignore=ignore)
        os.utime(path / "config.yaml", (1000 + number, 1000 + number))
    newest = tmp_path / "runs" / "cut-6"
    (newest / "result.json").write_text('{"exit_code": 75}')
    shutil.copytree(tiny_run.path, tmp_path / "runs" / "finished")
    other = tmp_path / "runs" / "other"
    shutil.copytree(newest, other)
    config = (other / "config.yaml").read_text()
    assert "seed: 42" in config
    (other / "config.yaml").write_text(config.replace("seed: 42", "seed: 43"))
    (tmp_path / "runs" / "broken").mkdir()
    (tmp_path / "runs" / "broken" / "config.yaml").write_text("a: [")

    some = run_cli(*arguments, cwd=tmp_path)
    assert some.code == 2
    newest_first = ", ".join(f"runs/cut-{number}" for number in (6, 5, 4, 3, 2))
    assert f"allowed:  {newest_first}\n" in some.err
    assert "lora-cli train runs/cut-6/recipe.yaml run.dir=runs/cut-6 --resume" in some.err

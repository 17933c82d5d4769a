"""A run that has lost files goes on to the same end as one that has not."""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from lora_cli.artifacts.checkpoint import list_checkpoints
from lora_cli.commands.repairing import metrics_of_start, repair_best
from lora_cli.commands.stopping import StopRequest
from lora_cli.training.loop import Trainer

WEIGHTS = "adapter/adapter_model.safetensors"


@pytest.fixture
def run(tiny_run: Any, tmp_path: Path) -> Path:
    """A copy of the finished run that stands before its last step."""
    path = tmp_path / "a"
    shutil.copytree(tiny_run.path, path)
    (path / "result.json").unlink()
    steps = list_checkpoints(path / "checkpoints")
    shutil.rmtree(steps[max(steps)])
    return path


def resume(run: Path, run_cli: Any, *more: str) -> Any:
    return run_cli("train", run / "recipe.yaml", f"run.dir={run}", "--resume", *more, cwd=run)


def result(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "result.json").read_bytes())
    timing = ("seconds", "samples_per_second", "peak_rss_bytes")
    return {name: value for name, value in found.items() if name not in timing}


def events(run: Path) -> list[tuple[str, int]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [(x["event"], x["step"]) for x in map(json.loads, lines)]


def test_lost_metrics_are_measured_again(run: Path, tiny_run: Any, run_cli: Any) -> None:
    """Twice: what a later step has measured is not taken for the base."""
    assert metrics_of_start
    (run / "metrics.jsonl").unlink()
    done = resume(run, run_cli)
    assert done.code == 0, done.err
    assert "has lost how the run began" in done.err
    assert events(run)[:2] == [("base", 0), ("eval", 0)]
    assert result(run) == result(tiny_run.path)
    (run / "result.json").unlink()
    again = resume(run, run_cli)
    assert again.code == 0, again.err
    assert "has lost" not in again.err
    assert result(run) == result(tiny_run.path)


def test_lines_of_later_steps_are_not_those_of_the_start(
    run: Path, tiny_run: Any, run_cli: Any
) -> None:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    kept = [line for line in lines if json.loads(line)["step"] > 0]
    (run / "metrics.jsonl").write_text("\n".join(kept) + "\n")
    done = resume(run, run_cli)
    assert done.code == 0, done.err
    assert result(run) == result(tiny_run.path)


def lose(adapter: Path) -> None:
    shutil.rmtree(adapter)


def damage(adapter: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("harm", [lose, damage])
@pytest.mark.parametrize("finished", [False, True])
def test_the_best_adapter_comes_back(
    run: Path, tiny_run: Any, run_cli: Any, harm: Any, finished: bool
) -> None:
    assert repair_best
    if finished:
        shutil.rmtree(run)
        shutil.copytree(tiny_run.path, run)
    expected = (run / WEIGHTS).read_bytes()
    assert expected == (tiny_run.path / WEIGHTS).read_bytes()
    harm(run / "adapter")
    done = resume(run, run_cli)
    assert done.code == 0, done.err
    assert "the best adapter was written again from the checkpoint of step" in done.err
    assert (run / WEIGHTS).read_bytes() == expected
    assert result(run) == result(tiny_run.path)


def test_an_average_comes_back(tiny_run: Any, run_cli: Any, tmp_path: Path) -> None:
    settings = [*tiny_run.settings, "trainer.ema_decay=0.9", "run.dir=a", "--quiet"]
    whole = run_cli("train", *settings, cwd=tmp_path)
    assert whole.code == 0, whole.err
    run = tmp_path / "a"
    expected = (run / WEIGHTS).read_bytes()
    lose(run / "adapter")
    done = resume(run, run_cli)
    assert done.code == 0, done.err
    assert (run / WEIGHTS).read_bytes() == expected


def test_without_its_checkpoint_it_is_an_error(run: Path, run_cli: Any) -> None:
    steps = list_checkpoints(run / "checkpoints")
    progress = json.loads((steps[max(steps)] / "progress.json").read_bytes())
    assert (progress["step"], progress["best_step"]) == (3, 2)
    shutil.rmtree(steps[2])
    lose(run / "adapter")
    done = resume(run, run_cli)
    assert done.code == 2, done.err
    assert "error[resume.lost-adapter]" in done.err
    assert "put a copy of adapter/ back" in done.err


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_session_that_gets_nowhere_is_a_failure(
    tiny_run: Any, run_cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a scheduler would start it again for ever."""
    clock, train_step = Clock(), Trainer._train_step

    def step(self: Trainer) -> None:
        train_step(self)
        clock.now += 60

    monkeypatch.setattr(Trainer, "_train_step", step)
    monkeypatch.setattr("lora_cli.commands.train.StopRequest", partial(StopRequest, clock=clock))
    limit = "trainer.max_time=90"
    first = run_cli("train", *tiny_run.settings, limit, "run.dir=a", "--quiet", cwd=tmp_path)
    assert first.code == 75, first.err
    run = tmp_path / "a"
    # Everything before the first step takes longer than the session.
    listening = StopRequest.listening

    def late(self: StopRequest) -> Any:
        clock.now += 90
        return listening(self)

    with monkeypatch.context() as patch:
        patch.setattr(StopRequest, "listening", late)
        stuck = resume(run, run_cli, limit)
    assert stuck.code == 1, stuck.err
    assert "error[trainer.max-time]" in stuck.err
    assert "with nothing done beyond step 2, where this session began" in stuck.err
    assert json.loads((run / "result.json").read_bytes())["exit_code"] == 1
    assert resume(run, run_cli, "trainer.max_time=1h").code == 0
    assert (run / WEIGHTS).read_bytes() == (tiny_run.path / WEIGHTS).read_bytes()


def test_an_adapter_of_abandoned_steps_gives_way(
    tiny_run: Any, run_cli: Any, tmp_path: Path
) -> None:
    """It loads, but it is not that of the best step of this run."""
    settings = [s for s in tiny_run.settings if not s.startswith("optimizer.lr")]
    other = ("optimizer.lr=0.02", f"run.dir={tmp_path / 'b'}", "--quiet")
    assert run_cli("train", *settings, *other, cwd=tmp_path).code == 0
    run = tmp_path / "a"
    shutil.copytree(tiny_run.path, run)
    shutil.rmtree(run / "adapter")
    shutil.copytree(tmp_path / "b" / "adapter", run / "adapter")
    (run / "result.json").unlink()
    resumed = run_cli("train", run / "recipe.yaml", f"run.dir={run}", "--resume", cwd=tmp_path)
    assert resumed.code == 0, resumed.err
    assert "it was of steps that this run has abandoned" in resumed.err
    name = "adapter/adapter_model.safetensors"
    assert (run / name).read_bytes() == (tiny_run.path / name).read_bytes()
    again = json.loads((run / "result.json").read_text())
    assert again["adapter"] == json.loads((tiny_run.path / "result.json").read_text())["adapter"]


def test_the_best_step_has_a_checkpoint_whatever_the_steps_that_are_saved(
    tiny_run: Any, run_cli: Any, tmp_path: Path
) -> None:
    changed = ("trainer.max_steps", "trainer.eval_steps", "trainer.save_steps")
    settings = [s for s in tiny_run.settings if not s.startswith(changed)]
    steps = ("trainer.max_steps=7", "trainer.eval_steps=3", "trainer.save_steps=5")
    run = tmp_path / "a"
    done = run_cli("train", *settings, *steps, f"run.dir={run}", "--quiet", cwd=tmp_path)
    assert done.code == 0, done.err
    best = json.loads((run / "result.json").read_text())["best_step"]
    assert (run / "checkpoints" / f"step-{best:08d}" / "MANIFEST.json").is_file()
    shutil.rmtree(run / "adapter")
    (run / "result.json").unlink()
    resumed = run_cli("train", run / "recipe.yaml", f"run.dir={run}", "--resume", cwd=tmp_path)
    assert resumed.code == 0, resumed.err
    assert f"written again from the checkpoint of step {best}" in resumed.err


def test_before_the_first_evaluation_an_adapter_of_abandoned_steps_is_removed(
    tiny_run: Any, run_cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = [s for s in tiny_run.settings if not s.startswith("trainer.eval_steps")]
    run = tmp_path / "a"
    more = ("trainer.eval_steps=3", "trainer.keep_checkpoints=9", f"run.dir={run}", "--quiet")
    assert run_cli("train", *settings, *more, cwd=tmp_path).code == 0
    expected = (run / WEIGHTS).read_bytes()
    second = run / "checkpoints" / "step-00000002"
    assert json.loads((second / "progress.json").read_bytes())["best_step"] is None
    seen: list[bool] = []
    train = Trainer.run

    def watched(self: Trainer) -> Any:
        seen.append((run / "adapter").exists())
        return train(self)

    monkeypatch.setattr(Trainer, "run", watched)
    (run / "result.json").unlink()
    again = run_cli("train", run / "recipe.yaml", f"trainer.resume={second}", cwd=tmp_path)
    assert again.code == 0, again.err
    assert seen == [False]
    assert (run / WEIGHTS).read_bytes() == expected


def test_an_adapter_of_abandoned_steps_without_the_best_checkpoint_is_told(
    run: Path, tiny_run: Any, run_cli: Any, tmp_path: Path
) -> None:
    settings = [s for s in tiny_run.settings if not s.startswith("optimizer.lr")]
    other = ("optimizer.lr=0.02", f"run.dir={tmp_path / 'b'}", "--quiet")
    assert run_cli("train", *settings, *other, cwd=tmp_path).code == 0
    shutil.rmtree(run / "adapter")
    shutil.copytree(tmp_path / "b" / "adapter", run / "adapter")
    shutil.rmtree(run / "checkpoints" / "step-00000002")
    resumed = resume(run, run_cli)
    assert resumed.code == 0, resumed.err
    (line,) = [x for x in resumed.err.splitlines() if "is in no checkpoint any more" in x]
    assert line.startswith("warning: the best adapter, of step 2, ")
    assert "the next evaluation counts as the best until a better one" in line
    assert json.loads((run / "result.json").read_bytes())["best_step"] == 4

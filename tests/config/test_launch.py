import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lora_cli.config.composed import Composed, recipe_text
from lora_cli.config.launch import run_command
from lora_cli.errors import Problem, RunFailedError

Compose = Callable[..., list[Composed]]
Problems = Callable[..., list[Problem]]

NAMED = ("train", "model=bert", "task=sst2")


def test_no_option_cannot_be_chosen_on_the_command_line(problems_of: Any) -> None:
    (problem,) = problems_of("train", "model=null", "task=sst2")
    assert problem.message == '`model` must be an option of its config group, but is "null".'


def test_the_line_of_the_readme(compose_all: Any) -> None:
    (composed,) = compose_all(*NAMED, "lora.r=16")
    assert composed.config.lora.r == 16
    assert composed.config.lora.targets == "auto"
    assert composed.config.model.path == "google-bert/bert-base-uncased"
    assert composed.config.task.data.name == "sst2"
    assert composed.choices["task"] == "sst2"
    assert composed.origins["lora.r"] == "command line, lora.r=16"
    assert composed.origins["task.data.name"] == "configs/task/sst2.yaml"
    assert "seed" not in composed.origins
    assert not composed.multirun
    assert os.listdir() == []  # noqa: PTH208


def test_a_variant_starts_from_its_own_defaults(compose_all: Any) -> None:
    (composed,) = compose_all(*NAMED, "optimizer=sgd", "scheduler=polynomial")
    assert set(composed.plain["optimizer"]) == {
        *("name", "lr", "weight_decay", "weight_decay_a", "weight_decay_b"),
        *("momentum", "lora_plus_ratio"),
    }
    assert composed.config.optimizer.lr == 0.1
    assert composed.config.scheduler.power == 2.0


def test_all_problems_come_together(problems_of: Any) -> None:
    found = problems_of(
        "train", "model=brt", "task=sst2", "lora.rnak=4", "lora.r=0", "optimizer.lr=nan"
    )
    assert {problem.key for problem in found} == {"model", "lora.rnak", "lora.r", "optimizer.lr"}
    by_key = {problem.key: problem for problem in found}
    assert by_key["model"].fix == 'did you mean "bert"?'
    assert by_key["lora.rnak"].where == "command line, lora.rnak=4"
    assert by_key["lora.r"].message == "`lora.r` must be a whole number of at least 1, but is 0."


@pytest.mark.parametrize(
    ("override", "key", "identity"),
    [
        ("lora.r=0", "lora.r", "config.bad-value"),
        ("lora.r=true", "lora.r", "config.bad-value"),
        ("lora.r=1e3", "lora.r", "config.bad-value"),
        ("optimizer.lr=-1", "optimizer.lr", "config.bad-value"),
        ("optimizer.lr=inf", "optimizer.lr", "config.bad-value"),
        ("optimizer.momentum=0.5", "optimizer.momentum", "config.unknown-key"),
        ("optimizer.name=sgd", "optimizer.name", "config.bad-value"),
        ("+lora.x=1", "lora.x", "config.bad-override"),
        ("~lora.r", "lora.r", "config.bad-override"),
        ("lora.r=4,8", "lora.r", "config.sweep"),
        ("lora.targets=[a", "lora.targets", "config.bad-override"),
        ("trainer.early_stopping=1", "trainer.early_stopping", "config.bad-value"),
        ("run.name=../x", "run.name", "config.bad-value"),
        ("lora.alpha=${nowhere.at.all}", None, "config.not-composed"),
    ],
)
def test_bad_overrides(problems_of: Any, override: str, key: str | None, identity: str) -> None:
    (problem,) = problems_of(*NAMED, override)
    assert problem.id == identity
    assert key is None or problem.key == key


def test_a_repeated_setting(problems_of: Any) -> None:
    (problem,) = problems_of(*NAMED, "lora.r=4", "lora.r=8")
    assert problem.id == "config.repeated"


def test_groups_of_another_command(problems_of: Any) -> None:
    (problem,) = problems_of("eval", "runs/x", "model=bert")
    assert problem.id == "config.unknown-key"


def test_own_data_resets_the_names_of_a_task(compose_all: Any) -> None:
    (composed,) = compose_all(*NAMED, "task.data.path=rows.csv", "task.data.label_column=y")
    data = composed.config.task.data
    assert data.path == str(Path.cwd() / "rows.csv")
    assert (data.name, data.text_column, data.test_split) == (None, None, None)
    assert data.label_column == "y"
    assert composed.config.task.max_length == 64
    assert "task.data.text_column" not in composed.origins


@pytest.mark.parametrize(
    "text",
    [
        "/tmp/a=b",
        "data(1).csv",
        "/tmp/it's",
        "a, b {c} [d] ${x} \\ end",
        "\\${x}\\",
        "'quoted'",
        "${oc.env:HOME}",
        "x\\'",
        " spaces ",
        "100%",
        "1e-3",
        "true",
        "ünïcode ☃",
        "line\nbreak",
    ],
)
def test_awkward_texts_mean_what_they_say(compose_all: Any, text: str) -> None:
    (composed,) = compose_all(*NAMED, f"run.dir={text}", f"task.data.text_column={text}")
    assert composed.config.run.dir == text
    assert composed.config.task.data.text_column == text
    assert composed.origins["run.dir"] == f"command line, run.dir={text}"
    (predicted,) = compose_all("predict", "runs/x", f"text={text}")
    assert predicted.config.text == text


def test_null_is_null(compose_all: Any) -> None:
    (composed,) = compose_all(*NAMED, "task.data.text_column=null")
    assert composed.config.task.data.text_column is None


def test_a_sweep_runs_every_job(compose_all: Any) -> None:
    jobs = compose_all("train", "-m", "model=bert", "task=sst2,cola", "lora.r=4,8", "seed=1")
    found = [(job.choices["task"], job.config.lora.r, job.job_number) for job in jobs]
    assert found == [("sst2", 4, 0), ("sst2", 8, 1), ("cola", 4, 2), ("cola", 8, 3)]
    assert all(job.multirun for job in jobs)
    assert jobs[3].user == {
        "defaults": [{"model": "bert"}, {"task": "cola"}],
        "lora": {"r": 8},
        "seed": 1,
    }


def test_a_sweep_over_variants(compose_all: Any) -> None:
    jobs = compose_all(*NAMED, "-m", "optimizer=adamw,sgd", "lora.r=choice(4)")
    assert [job.config.optimizer.name for job in jobs] == ["adamw", "sgd"]


def test_a_sweep_is_checked_before_its_first_job(problems_of: Any) -> None:
    ran: list[Composed] = []

    def job(composed: Composed) -> int:
        ran.append(composed)
        return 0

    (problem,) = problems_of(*NAMED, "-m", "lora.r=4,0")
    assert problem.key == "lora.r"
    with pytest.raises(Exception, match=r"lora\.r"):
        run_command(
            "train",
            ["model=bert", "task=sst2", "lora.r=4,0"],
            ["--multirun"],
            recipe=None,
            job=job,
        )
    assert ran == []


def test_jobs_must_not_share_a_directory(problems_of: Any, compose_all: Any) -> None:
    (problem,) = problems_of(*NAMED, "-m", "lora.r=4,8", "run.dir=x")
    assert problem.id == "config.shared-directory"
    assert len(compose_all(*NAMED, "-m", "lora.r=4", "run.dir=x")) == 1


def test_errors_of_a_job_say_where_its_setting_was_set(tmp_path: Path) -> None:
    def job(composed: Composed) -> int:
        raise RunFailedError(Problem(id="x.y", message="No.", key="lora.r"))

    with pytest.raises(RunFailedError) as caught:
        run_command("train", ["model=bert", "task=sst2", "lora.r=3"], [], recipe=None, job=job)
    assert caught.value.problems[0].where == "command line, lora.r=3"


def test_the_largest_exit_code_of_a_sweep_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    codes = iter([0, 1, 0])
    code = run_command(
        "train",
        ["model=bert", "task=sst2", "seed=1,2,3"],
        ["--multirun"],
        recipe=None,
        job=lambda composed: next(codes),
    )
    assert code == 1


def test_own_groups_from_a_config_dir(compose_all: Any, tmp_path: Path) -> None:
    folder = tmp_path / "my configs"
    (folder / "optimizer").mkdir(parents=True)
    (folder / "model").mkdir()
    (folder / "optimizer" / "slow.yaml").write_text("defaults: [sgd]\nlr: 1e-5\n")
    (folder / "model" / "mine.yaml").write_text("path: org/mine\n")
    (folder / "all.yaml").write_text("defaults:\n  - model: mine\n  - task: sst2\nseed: 7\n")
    (composed,) = compose_all(
        "train", "--config-dir", str(folder), "model=mine", "task=sst2", "optimizer=slow"
    )
    assert composed.config.optimizer.lr == 1e-5
    assert composed.config.optimizer.name == "sgd"
    assert composed.user["defaults"] == [{"task": "sst2"}, {"optimizer": "sgd"}]
    assert composed.user["model"]["path"] == "org/mine"
    (named,) = compose_all("train", "--config-dir", str(folder), "--config-name", "all")
    assert (named.config.seed, named.config.model.path) == (7, "org/mine")


RECIPE = """
defaults:
  - model: minilm
  - task: movie_reviews
trainer:
  epochs: 5
scheduler:
  warmup_ratio: 0.2
run:
  name: mine
"""


def test_the_command_line_may_say_in_another_way_what_the_recipe_says(
    compose_all: Compose, tmp_path: Path
) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(RECIPE)
    (found,) = compose_all(
        "train", str(path), "trainer.max_steps=7", "scheduler.warmup_steps=2", "run.dir=here"
    )
    assert (found.config.trainer.max_steps, found.config.trainer.epochs) == (7, 3)
    assert found.config.scheduler.warmup_steps == 2
    assert (found.config.run.dir, found.config.run.name) == ("here", None)
    again = tmp_path / "again.yaml"
    again.write_text(recipe_text(found))
    (repeated,) = compose_all("train", str(again), "run.dir=here")
    assert repeated.config == found.config

    (short,) = compose_all("train", str(path), "trainer=short")
    assert short.config.trainer.max_steps == 20
    (default,) = compose_all("train", str(path), "trainer=default", "trainer.max_steps=null")
    assert (default.config.trainer.epochs, default.config.run.name) == (5, "mine")


def test_one_place_that_says_both_is_a_contradiction(problems_of: Problems, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(RECIPE.replace("epochs: 5", "epochs: 5\n  max_steps: 7"))
    assert [problem.id for problem in problems_of("train", str(path))] == ["config.contradiction"]
    line = ("train", "trainer.epochs=2", "trainer.max_steps=7", "model=minilm", "task=sst2")
    assert "config.contradiction" in [problem.id for problem in problems_of(*line)]


def test_paths_that_a_run_writes_down_mean_the_same_from_any_folder(
    compose_all: Compose, tmp_path: Path
) -> None:
    (tmp_path / "d.csv").write_text("text,label\n")
    (tmp_path / "base").mkdir()
    line = ("train", "model.path=base", "task.data.path=d.csv", "run.dir=r")
    (found,) = compose_all(*line)
    assert found.config.model.path == str(tmp_path / "base")
    assert found.plain["task"]["data"]["path"] == str(tmp_path / "d.csv")
    assert found.config.run.dir == "r"
    again = tmp_path / "again.yaml"
    again.write_text(recipe_text(found))
    (repeated,) = compose_all("train", str(again), "run.dir=r")
    assert repeated.plain == found.plain
    (hub,) = compose_all("train", "model.path=org/name", "task.data.path=cache://x", "run.dir=r")
    assert (hub.config.model.path, hub.config.task.data.path) == ("org/name", "cache://x")


def test_showing_a_configuration_checks_its_values(problems_of: Problems) -> None:
    found = problems_of("train", "lora.r=0", "optimizer.lr=-1", "--cfg", "job")
    assert [problem.key for problem in found] == ["lora.r", "optimizer.lr"]

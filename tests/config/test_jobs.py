"""What the choices of a job decide on reaches everything that reads it."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from lora_cli.config.composed import recipe_text
from lora_cli.config.launch import run_command
from lora_cli.config.optim import AdamWConfig, ConstantConfig
from lora_cli.config.strategies import LR_FACTOR
from lora_cli.errors import Problem, RunFailedError

LORA_RECIPE = """
defaults:
  - model: minilm
  - task: movie_reviews
  - lora: dora
  - optimizer: lora_plus
lora:
  r: 32
  rank_pattern: {query: 4}
run:
  name: r${lora.r}-lr${optimizer.lr}
"""
FULL_LR = pytest.approx(AdamWConfig().lr * LR_FACTOR["full"])


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    path = tmp_path / "r.yaml"
    path.write_text(LORA_RECIPE)
    return str(path)


def test_references_lead_to_what_is_used(compose_all: Any, recipe: str) -> None:
    (lora,) = compose_all("train", recipe)
    assert lora.config.run.name == f"r32-lr{lora.config.optimizer.lr}"
    (full,) = compose_all("train", recipe, "strategy=full")
    assert full.config.optimizer.lr == FULL_LR
    assert full.config.run.name == f"r8-lr{full.config.optimizer.lr}"


def test_an_option_that_gives_way_takes_its_learning_rate_along(
    compose_all: Any, recipe: str, tmp_path: Path
) -> None:
    (full,) = compose_all("train", recipe, "strategy=full")
    assert full.config.optimizer == AdamWConfig(lr=full.config.optimizer.lr)
    assert full.origins["optimizer.lr"].startswith("default of optimizer=adamw")
    assert full.user["defaults"] == [
        {"model": "minilm"},
        {"task": "movie_reviews"},
        {"strategy": "full"},
    ]
    again = tmp_path / "again.yaml"
    again.write_text(recipe_text(full))
    (repeated,) = compose_all("train", str(again), f"run.name={full.config.run.name}")
    assert repeated.plain == full.plain
    (kept,) = compose_all("train", recipe, "strategy=full", "optimizer.lr=3e-4")
    assert (kept.config.optimizer.lr, kept.config.optimizer.lora_plus_ratio) == (3e-4, 1.0)


def test_an_option_of_another_variant_that_gives_way_keeps_its_variant(
    compose_all: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "mine"
    (folder / "optimizer").mkdir(parents=True)
    (folder / "optimizer" / "plus.yaml").write_text("defaults: [sgd]\nlora_plus_ratio: 4\n")
    path = tmp_path / "r.yaml"
    path.write_text("defaults: [model: minilm, task: movie_reviews, optimizer: plus]\n")
    own = ("--config-dir", str(folder))
    (head,) = compose_all("train", str(path), *own, "strategy=head")
    assert (head.config.optimizer.name, head.config.optimizer.lora_plus_ratio) == ("sgd", 1.0)
    again = tmp_path / "again.yaml"
    again.write_text(recipe_text(head))
    (repeated,) = compose_all("train", str(again))
    assert repeated.plain == head.plain


def test_what_gave_way_is_not_shown(compose_all: Any, recipe: str, capsys: Any) -> None:
    (full,) = compose_all("train", recipe, "strategy=full")
    assert compose_all("train", recipe, "strategy=full", "--cfg", "job", "--resolve") == []
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["lora"] == full.plain["lora"]
    assert shown["optimizer"] == full.plain["optimizer"]
    assert shown["run"] == full.plain["run"]


def test_the_line_is_held_to_what_the_recipe_may_drop(problems_of: Any, recipe: str) -> None:
    (problem,) = problems_of("train", recipe, "strategy=full", "lora.variant=dora")
    assert (problem.id, problem.key) == ("config.not-read", "lora.variant")


def test_a_default_that_gave_way_is_that_of_its_variant(compose_all: Any, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(
        "defaults: [model: minilm, task: movie_reviews, scheduler: constant]\n"
        "scheduler: {warmup_ratio: 0.2}\n"
    )
    (found,) = compose_all("train", str(path), "scheduler.warmup_steps=2")
    assert found.config.scheduler == ConstantConfig(warmup_steps=2)
    again = tmp_path / "again.yaml"
    again.write_text(recipe_text(found))
    (repeated,) = compose_all("train", str(again))
    assert repeated.plain == found.plain


def test_an_error_says_where_a_default_came_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def job(_: Any) -> int:
        raise RunFailedError(Problem(id="x.y", message="No.", key="optimizer.lr"))

    overrides = ["model=minilm", "task=movie_reviews", "strategy=full"]
    with pytest.raises(RunFailedError) as caught:
        run_command("train", overrides, [], recipe=None, job=job)
    (problem,) = caught.value.problems
    assert problem.where == (
        f"default of optimizer=adamw times {LR_FACTOR['full']:g} for strategy=full"
    )

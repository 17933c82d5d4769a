from pathlib import Path
from typing import Any

import pytest

from lora_cli.config.recipe import find_recipe, read_recipe, scan_folder, shipped_recipes
from lora_cli.errors import UserError

GROUPS = ["model", "task"]


def write(folder: Path, text: str, name: str = "recipe.yaml") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_a_recipe_gives_choices_and_lines(tmp_path: Path) -> None:
    text = "# mine\ndefaults:\n  - model: bert\n  - task: null\n  - _self_\nlora:\n  r: 4\n"
    recipe = read_recipe(write(tmp_path, text), groups=GROUPS)
    assert recipe.defaults == (("model", "bert"), ("task", None), ("_self_", None))
    assert recipe.lines["lora.r"] == 7


@pytest.mark.parametrize(
    ("entry", "identity"),
    [
        ("hydra: default", "recipe.refused"),
        ("hydra/launcher: evil", "recipe.refused"),
        ("override hydra/launcher: evil", "recipe.refused"),
        ("override model: bert", "recipe.refused"),
        ("model@task: bert", "recipe.refused"),
        ("/model: bert", "recipe.refused"),
        ("optional model: bert", "recipe.refused"),
        ("optimizr: adamw", "recipe.refused"),
        ("../evil", "recipe.refused"),
        ("evil", "recipe.refused"),
        ("model: ../../evil", "config.unknown-option"),
        ("model: /tmp/evil", "config.unknown-option"),
        ("model: [bert, albert]", "recipe.refused"),
    ],
)
def test_defaults_hold_groups_only(tmp_path: Path, entry: str, identity: str) -> None:
    with pytest.raises(UserError) as caught:
        read_recipe(write(tmp_path, f"defaults:\n  - {entry}\n"), groups=GROUPS)
    (problem,) = caught.value.problems
    assert problem.id == identity
    assert problem.where == f"{tmp_path / 'recipe.yaml'}:2"


def test_a_group_is_chosen_once(tmp_path: Path) -> None:
    with pytest.raises(UserError):
        read_recipe(
            write(tmp_path, "defaults:\n  - model: bert\n  - model: albert\n"), groups=GROUPS
        )


def test_relative_paths_belong_to_the_recipe(compose_all: Any, tmp_path: Path) -> None:
    (tmp_path / "deep" / "org").mkdir(parents=True)
    (tmp_path / "deep" / "org" / "here").mkdir()
    text = (
        "defaults: [{task: sst2}]\nmodel: {path: org/here}\n"
        "task: {data: {path: ../rows.jsonl}}\nrun: {dir: out}\noptimizer: {lr: 2e-5}\n"
    )
    (composed,) = compose_all("train", str(write(tmp_path / "deep", text)))
    assert composed.config.model.path == str(tmp_path / "deep" / "org" / "here")
    assert composed.config.task.data.path == str(tmp_path / "rows.jsonl")
    assert composed.config.task.data.text_column is None
    assert composed.config.run.dir == str(tmp_path / "deep" / "out")
    assert composed.config.optimizer.lr == 2e-5


def test_the_command_line_wins_over_a_recipe(compose_all: Any, tmp_path: Path) -> None:
    path = write(tmp_path, "defaults: [{model: bert}, {task: sst2}]\nlora: {r: 4, alpha: 2}\n")
    (composed,) = compose_all("train", str(path), "lora.r=8", "task=cola")
    assert (composed.config.lora.r, composed.config.lora.alpha) == (8, 2.0)
    assert composed.choices["task"] == "cola"
    assert composed.user["defaults"] == [{"model": "bert"}, {"task": "cola"}]
    assert composed.origins["lora.alpha"] == f"{path}:2"


def test_problems_of_a_recipe_and_a_line_come_together(problems_of: Any, tmp_path: Path) -> None:
    path = write(tmp_path, "defaults: [{model: bert}, {task: sst2}]\nlora:\n  rr: 4\n")
    found = problems_of("train", str(path), "optimizer.lr=-1", "trainer.epoch=1")
    assert {problem.key for problem in found} == {"lora.rr", "optimizer.lr", "trainer.epoch"}
    assert {problem.where for problem in found} >= {f"{path}:3"}


def test_references_between_settings(compose_all: Any, tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "defaults: [{model: bert}, {task: sst2}]\nlora: {r: 4, alpha: '${lora.r}'}\n"
        "run: {name: 'r${lora.r}'}\n",
    )
    (composed,) = compose_all("train", str(path), "lora.r=8")
    assert composed.config.lora.alpha == 8.0
    assert composed.config.run.name == "r8"


@pytest.mark.parametrize("name", ["train.yaml", "base.yaml", "eval.yaml"])
def test_a_recipe_may_have_the_name_of_a_config_of_ours(
    compose_all: Any, tmp_path: Path, name: str
) -> None:
    path = write(tmp_path, "defaults: [{model: bert}, {task: sst2}]\nseed: 5\n", name)
    (composed,) = compose_all("train", str(path))
    assert composed.config.seed == 5
    assert composed.config.lora.r == 8


def test_shipped_recipes_are_found_by_name(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert "movie-reviews-minilm" in shipped_recipes()
    for subject in ("movie-reviews-minilm", "recipes/movie-reviews-minilm.yaml"):
        assert find_recipe(subject) == shipped_recipes()["movie-reviews-minilm"]
    with pytest.raises(UserError, match="there is none"):
        find_recipe("other/movie-reviews-minilm.yaml")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("model/evil.yaml", "_target_: os.system\n"),
        ("model/evil.yaml", "# @package hydra\nx: 1\n"),
        ("model/evil.yaml", "defaults: [/hydra/launcher/evil]\n"),
        ("model/evil.yaml", "defaults: [{override /hydra/launcher: evil}]\n"),
        ("hydra/launcher/evil.yaml", "x: 1\n"),
        ("base/train.yaml", "x: 1\n"),
        ("model/bert.yaml", "path: mine\n"),
        ("evil.yml", "hydra: {}\n"),
    ],
)
def test_a_config_dir_is_scanned(tmp_path: Path, name: str, text: str) -> None:
    write(tmp_path, text, name)
    with pytest.raises(UserError):
        scan_folder(tmp_path)


def test_a_config_dir_must_exist(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="must be a folder"):
        scan_folder(tmp_path / "none")

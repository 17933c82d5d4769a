from pathlib import Path
from typing import Any

from lora_cli.config.composed import recipe_text


def test_a_written_recipe_repeats_the_run(compose_all: Any, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("text,label\n")
    (first,) = compose_all(
        "train",
        "model=minilm",
        "task=sst2",
        "optimizer=sgd",
        "optimizer.lr=1e-5",
        "task.data.path=rows.csv",
        "task.data.text_column=a ${b} \\${c}",
        "lora.targets=[query,value]",
        "run.dir=out",
    )
    text = recipe_text(first)
    assert "out" not in text
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    recipe = elsewhere / "recipe.yaml"
    recipe.write_text(text, encoding="utf-8")
    (again,) = compose_all("train", str(recipe), "run.dir=out")
    path = str(tmp_path / "rows.csv")
    assert again.config.task.data.path == path
    assert again.plain == {
        **first.plain,
        "task": {**first.plain["task"], "data": {**first.plain["task"]["data"], "path": path}},
    }
    assert recipe_text(again) == text


def test_nothing_chosen_is_an_empty_recipe(compose_all: Any) -> None:
    (composed,) = compose_all("eval", "from=runs/x")
    assert composed.user == {"from": str(Path.cwd() / "runs" / "x")}


def test_mappings_and_lists_survive_the_written_recipe(compose_all: Any, tmp_path: Path) -> None:
    (first,) = compose_all(
        "train",
        "model=minilm",
        "task=sst2",
        'lora.rank_pattern={z: 4, "*.layer.[01].*": 16, a: 2}',
        "lora.alpha_pattern={}",
        "lora.layers=[0,8-11]",
        "adapter=runs/a",
    )
    recipe = tmp_path / "deep" / "recipe.yaml"
    recipe.parent.mkdir()
    recipe.write_text(recipe_text(first), encoding="utf-8")
    (again,) = compose_all("train", str(recipe))
    assert again.config == first.config
    assert list(again.config.lora.rank_pattern) == ["z", "*.layer.[01].*", "a"]
    assert again.config.adapter == str(tmp_path / "runs" / "a")

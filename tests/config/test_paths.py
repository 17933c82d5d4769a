from pathlib import Path
from typing import Any

import pytest

from lora_cli.config.paths import absolute_path, fix_recorded_paths, make_absolute


@pytest.mark.parametrize(
    "value", [None, "", "-", "pkg://a/b", "cache://x", "${run.dir}", "/abs/x", 3]
)
def test_what_is_no_relative_path_stays(tmp_path: Path, value: Any) -> None:
    assert absolute_path("run.dir", value, tmp_path) == value


@pytest.mark.parametrize("value", ["org/name", "bert-base-uncased", "org.x/na.me-2"])
def test_hub_names_stay_unless_they_exist(tmp_path: Path, value: str) -> None:
    assert absolute_path("model.path", value, tmp_path) == value
    assert absolute_path("run.dir", value, tmp_path) == str(tmp_path / value)
    (tmp_path / value).mkdir(parents=True)
    assert absolute_path("model.path", value, tmp_path) == str(tmp_path / value)


@pytest.mark.parametrize("value", ["data/train.csv", "./org/name", "../x", "a/b/c"])
def test_paths_become_absolute(tmp_path: Path, value: str) -> None:
    found = Path(absolute_path("task.data.path", value, tmp_path / "deep"))
    assert found.is_absolute()
    assert found == (tmp_path / "deep" / value).resolve()


def test_each_path_of_a_list_becomes_absolute(tmp_path: Path) -> None:
    found = absolute_path("adapters", ["a", "/b", "pkg://c/d"], tmp_path)
    assert found == [str(tmp_path / "a"), "/b", "pkg://c/d"]


def test_paths_in_a_recipe_are_relative_to_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "a ${b}"
    body = {
        "adapter": "runs/a",
        "adapters": ["x", "${adapter}", "/y"],
        "run": {"dir": "r", "name": "n"},
        "seed": 1,
    }
    make_absolute(body, "", paths={"adapter", "adapters", "run.dir"}, folder=folder)
    inside = str(tmp_path / "a \\${b}")
    assert body == {
        "adapter": f"{inside}/runs/a",
        "adapters": [f"{inside}/x", "${adapter}", "/y"],
        "run": {"dir": f"{inside}/r", "name": "n"},
        "seed": 1,
    }


def test_recorded_paths_are_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    plain = {"model": {"path": "./base"}, "adapter": "runs/a", "run": {"dir": "r"}}
    fix_recorded_paths(plain, "train")
    assert plain == {
        "model": {"path": str(tmp_path / "base")},
        "adapter": str(tmp_path / "runs" / "a"),
        "run": {"dir": "r"},
    }


def test_words_are_no_paths_where_they_mean_something(tmp_path: Path) -> None:
    for word in ("auto", "never"):
        assert absolute_path("trainer.resume", word, tmp_path) == word
        assert absolute_path("run.dir", word, tmp_path) == str(tmp_path / word)
    assert absolute_path("trainer.resume", "runs/a", tmp_path) == str(tmp_path / "runs" / "a")

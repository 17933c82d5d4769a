from pathlib import Path
from typing import Any

import pytest

from lora_cli.config.paths import absolute_path


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

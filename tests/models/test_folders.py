from collections.abc import Callable
from pathlib import Path
from shutil import copytree

import pytest

from lora_cli.models.folders import check_configs, check_folder, has_processor


@pytest.fixture
def folder(tiny_model_dir: Callable[..., Path], tmp_path: Path) -> Path:
    return Path(copytree(tiny_model_dir(), tmp_path / "model"))


def test_a_whole_folder_has_no_problems(folder: Path) -> None:
    assert list(check_folder(folder, processor="tokenizer")) == []
    assert has_processor(folder, "tokenizer")


def test_configurations_are_checked_without_weights_or_tokenizer(folder: Path) -> None:
    for path in folder.iterdir():
        if path.name != "config.json":
            path.unlink()
    assert list(check_configs(folder)) == []
    assert not has_processor(folder, "tokenizer")
    found = [problem.id for problem in check_folder(folder, processor="tokenizer")]
    assert found == ["model.no-weights", "model.no-tokenizer"]
    assert [problem.id for problem in check_folder(folder, processor=None)] == found[:1]

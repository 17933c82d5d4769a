import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from lora_cli.artifacts.adapter import find_subject, load_adapter
from lora_cli.commands.recorded import training_config
from lora_cli.errors import UserError


@pytest.fixture
def run(tiny_run: Any, tmp_path: Path) -> Path:
    copy = tmp_path / "a"
    shutil.copytree(tiny_run.path, copy, ignore=shutil.ignore_patterns("checkpoints"))
    return copy


def config_of(path: Path) -> Any:
    subject = find_subject(str(path))
    return training_config(load_adapter(subject.adapter)[1], subject)


def test_a_run_knows_where_its_data_is_and_an_adapter_alone_does_not(run: Path) -> None:
    whole = config_of(run)
    assert whole.task.data.path is not None
    shutil.move(run / "adapter", run.parent / "alone")
    alone = config_of(run.parent / "alone")
    assert alone.task.data.path is None
    assert alone.task.max_length == whole.task.max_length == 32


@pytest.mark.parametrize(
    ("line", "changed"),
    [("max_length: 32", "max_length: 33"), ("r: 4", "r: 8"), ("seed: 42", "seed: 43")],
)
def test_a_configuration_that_was_edited_is_noticed(run: Path, line: str, changed: str) -> None:
    path = run / "config.yaml"
    text = path.read_text(encoding="utf-8")
    edited = re.sub(rf"\b{line}\b", changed, text, count=1)
    assert edited != text
    path.write_text(edited, encoding="utf-8")
    with pytest.raises(UserError, match="must be what the adapter was trained with") as caught:
        config_of(run)
    (problem,) = caught.value.problems
    assert problem.id == "run.changed-config"
    assert problem.where == str(path)


def test_what_may_change_when_a_run_is_resumed_may_differ(run: Path) -> None:
    path = run / "config.yaml"
    text = path.read_text(encoding="utf-8")
    edited = text.replace("eval_batch_size: 64", "eval_batch_size: 7")
    assert edited != text
    path.write_text(edited, encoding="utf-8")
    found = config_of(run)
    assert found.trainer.eval_batch_size == 7

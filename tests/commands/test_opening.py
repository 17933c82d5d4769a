"""Opening adapters: strict about head, base and record, and free of what is not theirs."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_cli.artifacts.adapter import Subject
from lora_cli.artifacts.commit import document_sha256
from lora_cli.commands.locating import default_output
from lora_cli.commands.opening import load_merged, open_adapter
from lora_cli.config.tasks import DataConfig
from lora_cli.errors import UserError


def problem_of(action: Callable[[], Any]) -> Any:
    with pytest.raises(UserError) as caught:
        action()
    return caught.value.problems[0]


@pytest.fixture
def adapter(tiny_run: Any, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_run.path / "adapter", tmp_path / "alone"))


def test_a_run_opens_with_everything(tiny_run: Any) -> None:
    opened = open_adapter(str(tiny_run.path), base=None)
    assert opened.subject.run == tiny_run.path
    assert opened.config.lora.r == 4
    assert opened.record.state["labels"] == ["negative", "positive"]
    assert set(opened.inputs) == {tiny_run.path / "adapter", tiny_run.base}
    model = opened.attach()
    state = model.state_dict()
    for name, tensor in opened.adapter.state.items():
        assert torch.equal(state[name], tensor), name
    splits, _ = opened.load_splits(DataConfig())
    assert {name: len(rows) for name, rows in splits.rows.items()} == {
        "train": 64,
        "validation": 32,
        "test": 32,
    }


def test_an_adapter_without_its_head_is_refused(tiny_run: Any) -> None:
    opened = open_adapter(str(tiny_run.path), base=None)
    for kept, lost in ((("classifier",), "bert.pooler"), (("bert.pooler",), "classifier")):
        bare = replace(opened, adapter=replace(opened.adapter, saved_modules=kept))
        problem = problem_of(bare.attach)
        assert problem.id == "adapter.no-head"
        assert lost in problem.message


def test_an_adapter_alone_knows_its_base_but_not_the_place_of_its_data(adapter: Path) -> None:
    opened = open_adapter(str(adapter), base=None)
    assert opened.subject.run is None
    assert problem_of(lambda: opened.load_splits(DataConfig())).id == "adapter.no-data"
    record = (adapter / "lora_cli.json").read_text()
    assert "toy" not in record


@pytest.mark.parametrize(
    "state", [{}, {"labels": 3}, {"labels": ["a", "b"]}, {"labels": ["a", "b"], "columns": 7}]
)
def test_a_record_that_cannot_be_used_is_the_users_problem(adapter: Path, state: Any) -> None:
    path = adapter / "lora_cli.json"
    document = {**json.loads(path.read_text()), "state": state}
    path.write_text(json.dumps({**document, "sha256": document_sha256(document)}))
    problem = problem_of(lambda: open_adapter(str(adapter), base=None))
    assert problem.id == "adapter.record"
    assert problem.where == str(path)


def test_other_labels_than_the_head_has_are_refused(adapter: Path) -> None:
    path = adapter / "lora_cli.json"
    document = json.loads(path.read_text())
    document["state"]["labels"] = ["a", "b", "c"]
    path.write_text(json.dumps({**document, "sha256": document_sha256(document)}))
    opened = open_adapter(str(adapter), base=None)
    assert "classifier" in problem_of(opened.attach).message


def test_a_config_of_other_keys_is_refused(adapter: Path) -> None:
    path = adapter / "lora_cli.json"
    document = json.loads(path.read_text())
    document["config"]["lora"]["rnak"] = 4
    path.write_text(json.dumps({**document, "sha256": document_sha256(document)}))
    problem = problem_of(lambda: open_adapter(str(adapter), base=None))
    assert problem.where == str(path)
    assert "rnak" in problem.message


def test_settings_of_new_rows_need_new_rows(tiny_run: Any) -> None:
    opened = open_adapter(str(tiny_run.path), base=None)
    problem = problem_of(lambda: opened.load_splits(DataConfig(text_column="body")))
    assert problem.id == "data.no-path"
    assert problem.key == "task.data.text_column"


def test_new_rows_have_no_roles(tiny_run: Any) -> None:
    opened = open_adapter(str(tiny_run.path), base=None)
    data = DataConfig(path=str(tiny_run.data), train_split="test", test_split="none")
    with pytest.raises(UserError) as caught:
        opened.load_splits(data)
    problems = caught.value.problems
    assert [p.key for p in problems] == ["task.data.train_split", "task.data.test_split"]
    assert all("split=NAME" in str(problem.fix) for problem in problems)


def test_a_base_is_no_merged_model(tiny_run: Any) -> None:
    opened = open_adapter(str(tiny_run.path), base=None)
    assert problem_of(lambda: load_merged(opened, str(tiny_run.base))).id == "eval.not-merged"


def test_where_results_go(tmp_path: Path) -> None:
    alone = Subject(adapter=tmp_path, run=None)
    in_run = Subject(adapter=tmp_path / "adapter", run=tmp_path)
    assert default_output(alone, "x", "merged") == Path("x")
    assert default_output(in_run, None, "merged") == tmp_path / "merged"
    assert problem_of(lambda: default_output(alone, None, "merged")).key == "output"

"""The adapter folder: everything that a later command needs, and what happens when it is not."""

import dataclasses
import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_cli.artifacts.adapter import (
    RECORD,
    AdapterRecord,
    find_subject,
    load_adapter,
    save_adapter,
)
from lora_cli.artifacts.peft_format import PeftAdapter
from lora_cli.artifacts.tuned import TUNED_FILE, Tuned
from lora_cli.errors import UserError
from lora_cli.lora.prefix import STATE, PrefixSize
from lora_cli.lora.settings import LoraSettings

RECORDED = AdapterRecord(
    config={"seed": 3, "task": {"data": {"path": None}}},
    state={"labels": ["ärger", "joy"], "columns": {"text": "text"}, "numbered": False},
    base={"name": "bert", "revision": None, "sha256": "a" * 64},
    metrics={"split": "validation", "rows": 2, "base": {}, "adapter": {"accuracy": 0.5}},
)
LAYER = "bert.encoder.layer.0.attention.self.query"


def make_adapter() -> PeftAdapter:
    draw = torch.Generator().manual_seed(0)
    return PeftAdapter(
        settings=LoraSettings(r=2, alpha=3.5, dropout=0.25),
        targets=("query",),
        saved_modules=("classifier",),
        task_type="SEQ_CLS",
        base_name="org/bert",
        revision="main",
        state={
            f"{LAYER}.lora_A.weight": torch.randn(2, 8, generator=draw),
            f"{LAYER}.lora_B.weight": torch.randn(8, 2, generator=draw),
            "classifier.weight": torch.randn(2, 8, generator=draw),
            "classifier.bias": torch.randn(2, generator=draw),
        },
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "run" / "adapter"
    names = [LAYER, "classifier"]
    save_adapter(path, make_adapter(), RECORDED, card="# card\n", module_names=names)
    return path


def problem_of(action: Callable[[], Any]) -> Any:
    with pytest.raises(UserError) as caught:
        action()
    (problem,) = caught.value.problems
    return problem


def test_an_adapter_comes_back_as_it_was(folder: Path) -> None:
    adapter, record = load_adapter(folder)
    assert record == RECORDED
    saved = make_adapter()
    assert isinstance(adapter, PeftAdapter)
    assert adapter.settings == LoraSettings(r=2, alpha=3.5, dropout=0.25)
    assert (adapter.base_name, adapter.revision) == ("org/bert", "main")
    assert adapter.targets == ("query",)
    assert adapter.saved_modules == ("classifier",)
    assert adapter.state.keys() == saved.state.keys()
    assert all(torch.equal(adapter.state[name], saved.state[name]) for name in saved.state)
    assert (folder / "README.md").read_text() == "# card\n"


def test_a_combination_says_what_it_is_from(tmp_path: Path) -> None:
    combined = {"method": "ties", "adapters": [{"name": "a", "weight": 0.5, "sha256": "b" * 64}]}
    made = dataclasses.replace(RECORDED, combined=combined)
    save_adapter(tmp_path / "x", make_adapter(), made, card="", module_names=[LAYER, "classifier"])
    assert load_adapter(tmp_path / "x")[1] == made
    assert load_adapter(tmp_path / "x")[1] != RECORDED


def test_saving_replaces_the_whole_folder_and_returns_its_size(folder: Path) -> None:
    (folder / "stale.txt").write_text("old")
    size = save_adapter(folder, make_adapter(), RECORDED, card="", module_names=[])
    assert not (folder / "stale.txt").exists()
    assert size == sum(path.stat().st_size for path in folder.iterdir())
    assert [path.name for path in folder.parent.iterdir()] == ["adapter"]


def change(folder: Path, **values: Any) -> None:
    path = folder / RECORD
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_a_newer_format_is_refused(folder: Path) -> None:
    change(folder, format=2)
    problem = problem_of(lambda: load_adapter(folder))
    assert problem.id == "adapter.record"
    assert "of format 2, newer than 1" in problem.message
    assert problem.where == str(folder / RECORD)


def test_a_missing_record_is_named(folder: Path) -> None:
    (folder / RECORD).unlink()
    problem = problem_of(lambda: load_adapter(folder))
    assert problem.id == "adapter.record"
    assert "missing" in problem.message


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "null", '{"format": 1}', '{"format": "1"}'])
def test_a_damaged_record_is_refused(folder: Path, text: str) -> None:
    (folder / RECORD).write_text(text)
    assert problem_of(lambda: load_adapter(folder)).id == "adapter.record"


@pytest.mark.parametrize("field", ["config", "state", "base", "metrics"])
def test_a_record_of_other_types_is_refused(folder: Path, field: str) -> None:
    change(folder, **{field: 7})
    assert problem_of(lambda: load_adapter(folder)).id == "adapter.record"


def test_a_changed_tensor_file_is_refused(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert problem_of(lambda: load_adapter(folder)).id == "adapter.damaged"


def test_run_and_adapter_are_both_found(folder: Path) -> None:
    run = folder.parent
    alone = find_subject(str(folder))
    assert (alone.adapter, alone.run) == (folder, None)
    (run / "config.yaml").write_text("{}")
    for path in (run, folder):
        subject = find_subject(str(path))
        assert (subject.adapter, subject.run) == (folder, run)
    copy = run.parent / "copy"
    shutil.copytree(folder, copy)
    assert find_subject(str(copy)).run is None


def test_an_unfinished_run_says_how_to_go_on(tmp_path: Path) -> None:
    run = tmp_path / "it's mine"
    run.mkdir()
    (run / "config.yaml").write_text("{}")
    problem = problem_of(lambda: find_subject(str(run)))
    assert "has no adapter yet" in problem.message
    assert shlex.split(problem.fix) == [
        "lora-cli",
        "train",
        str(run / "recipe.yaml"),
        f"run.dir={run}",
        "--resume",
    ]


def test_nothing_and_something_else_are_told_apart(tmp_path: Path) -> None:
    assert "does not exist" in problem_of(lambda: find_subject(str(tmp_path / "no"))).message
    assert "no adapter_config.json" in problem_of(lambda: find_subject(str(tmp_path))).message


def test_what_peft_cannot_load_has_no_config_of_peft(tmp_path: Path) -> None:
    path = tmp_path / "run" / "adapter"
    tuned = Tuned(state={"bert.encoder.layer.0.output.dense.bias": torch.arange(4.0)})
    size = save_adapter(path, tuned, RECORDED, card="# card\n", module_names=[])
    assert {entry.name for entry in path.iterdir()} == {TUNED_FILE, RECORD, "README.md"}
    assert size == sum(entry.stat().st_size for entry in path.iterdir())
    adapter, record = load_adapter(path)
    assert isinstance(adapter, Tuned)
    assert record == RECORDED
    assert adapter.state.keys() == tuned.state.keys()
    assert all(torch.equal(adapter.state[name], tuned.state[name]) for name in tuned.state)
    assert find_subject(str(path)).run is None
    (path.parent / "config.yaml").write_text("{}")
    assert find_subject(str(path.parent)).adapter == path


def test_a_prefix_is_written_as_peft_would(tmp_path: Path) -> None:
    size = PrefixSize(num_tokens=2, num_layers=1, num_heads=2, head_size=3)
    tuned = Tuned(
        state={STATE: torch.randn(size.shape), "classifier.weight": torch.randn(2, 6)},
        saved_modules=("classifier",),
        task_type="SEQ_CLS",
        base_name="org/bert",
        prefix=size,
    )
    path = tmp_path / "adapter"
    save_adapter(path, tuned, RECORDED, card="", module_names=[])
    assert (path / "adapter_model.safetensors").is_file()
    adapter, _ = load_adapter(path)
    assert isinstance(adapter, Tuned)
    assert (adapter.prefix, adapter.saved_modules) == (size, ("classifier",))
    assert all(torch.equal(adapter.state[name], tuned.state[name]) for name in tuned.state)
    assert find_subject(str(path)).adapter == path


def test_a_stale_file_beside_a_config_of_peft_is_not_taken(folder: Path) -> None:
    (folder / TUNED_FILE).write_bytes(b"")
    adapter, _ = load_adapter(folder)
    assert isinstance(adapter, PeftAdapter)

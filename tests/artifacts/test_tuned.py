from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from lora_cli.artifacts.tuned import TUNED_FILE, Tuned, load_tuned, tuned_files
from lora_cli.errors import UserError
from lora_cli.lora.prefix import PrefixSize

STATE = {
    "bert.encoder.layer.1.output.dense.bias": torch.arange(3.0),
    "classifier.weight": torch.ones(2, 3, dtype=torch.float64),
    "bert.counter": torch.tensor(7),
}


def write(folder: Path) -> Path:
    (content,) = tuned_files(Tuned(state=STATE)).values()
    path = folder / TUNED_FILE
    path.write_bytes(content)
    return path


def test_tensors_come_back_by_name(tmp_path: Path) -> None:
    path = write(tmp_path)
    with safe_open(path, framework="pt") as file:
        assert set(file.keys()) == set(STATE)
    tuned = load_tuned(tmp_path)
    assert tuned.state.keys() == STATE.keys()
    for name, tensor in STATE.items():
        assert tuned.state[name].dtype == tensor.dtype
        assert torch.equal(tuned.state[name], tensor)
    assert tuned.prefix is None


def test_the_file_may_be_replaced_while_its_tensors_live(tmp_path: Path) -> None:
    path = write(tmp_path)
    tuned = load_tuned(tmp_path)
    path.write_bytes(b"\0" * path.stat().st_size)
    assert torch.equal(tuned.state["classifier.weight"], STATE["classifier.weight"])


def test_equal_tensors_give_equal_bytes_in_any_order() -> None:
    turned = Tuned(state=dict(reversed(STATE.items())))
    assert tuned_files(turned) == tuned_files(Tuned(state=STATE))


@pytest.mark.parametrize("damage", ["missing", "cut", "empty"])
def test_a_damaged_file_is_named(tmp_path: Path, damage: str) -> None:
    path = write(tmp_path)
    content = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes(content[:-1] if damage == "cut" else b"")
    with pytest.raises(UserError) as caught:
        load_tuned(tmp_path)
    problem = caught.value.problems[0]
    assert (problem.id, problem.where) == ("adapter.damaged", str(path))


def test_peft_runs_a_prefix_of_a_kind_of_task_alone() -> None:
    size = PrefixSize(num_tokens=2, num_layers=1, num_heads=1, head_size=4)
    forms = [
        Tuned(state={}),
        Tuned(state={}, task_type="SEQ_CLS"),
        Tuned(state={}, prefix=size),
        Tuned(state={}, prefix=size, task_type="SEQ_CLS"),
    ]
    assert [form.loads_in_peft for form in forms] == [False, False, False, True]

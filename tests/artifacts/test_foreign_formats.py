"""Every format is told from the others by what its files have."""

from pathlib import Path

import pytest
import torch
from foreign_adapters import kohya, loralib, mlx, torchtune, write_adapter

from lora_cli.artifacts.foreign_file import read_foreign
from lora_cli.artifacts.foreign_formats import FORMATS, detect_format
from lora_cli.errors import UserError

ONE = torch.ones(1)


def test_each_is_told(tmp_path: Path) -> None:
    writers = {"loralib": loralib, "mlx-lm": mlx, "torchtune": torchtune, "kohya": kohya}
    for name, write in writers.items():
        assert detect_format(read_foreign(write(tmp_path / name)[0])).name == name
    config = {"peft_type": "ADALORA", "target_modules": ["q"]}
    tensors = {f"base_model.model.q.lora_{leaf}": ONE for leaf in "ABE"}
    folder = write_adapter(tmp_path / "PEFT", tensors, config)
    assert detect_format(read_foreign(folder)).name == "PEFT"
    assert {form.name for form in FORMATS} == {*writers, "PEFT"}


def test_what_is_missing_of_each_is_told(tmp_path: Path) -> None:
    file = read_foreign(write_adapter(tmp_path, {"q.lora_a": ONE}))
    with pytest.raises(UserError) as caught:
        detect_format(file)
    (problem,) = caught.value.problems
    assert problem.id == "convert.unclear"
    assert "mlx-lm (no lora_parameters in adapter_config.json)" in problem.message
    assert all(form.name in problem.message for form in FORMATS)


def test_a_mixture_is_not_guessed_at(tmp_path: Path) -> None:
    tensors = {"q.lora_A": ONE, "k.lora_down.weight": ONE}
    with pytest.raises(UserError, match="could be of kohya and of loralib"):
        detect_format(read_foreign(write_adapter(tmp_path, tensors)))

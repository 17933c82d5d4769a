"""What eval, predict, merge and export say of a file that they do not read."""

from pathlib import Path

import pytest
from foreign_adapters import loralib, mlx, torchtune

from lora_cli.artifacts.adapter import find_subject
from lora_cli.artifacts.foreign_marks import is_foreign
from lora_cli.errors import UserError


def test_foreign_folders_are_told_by_names_alone(tmp_path: Path) -> None:
    mlx(tmp_path / "a")
    torchtune(tmp_path / "b")
    assert is_foreign(tmp_path / "a")
    assert is_foreign(tmp_path / "a" / "adapters.safetensors")
    assert not is_foreign(tmp_path / "b")
    assert not is_foreign(tmp_path)


def test_the_fix_names_the_command(tmp_path: Path) -> None:
    for path in (mlx(tmp_path / "a")[0], loralib(tmp_path / "b")[0] / "lora.safetensors"):
        with pytest.raises(UserError) as caught:
            find_subject(str(path))
        fix = caught.value.problems[0].fix
        assert fix == f"lora-cli convert adapter={path} base=DIR output=DIR"

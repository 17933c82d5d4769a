"""Files of mlx-lm that say more or less than one scale and low-rank updates."""

import json
from pathlib import Path

import pytest
import torch
from foreign_adapters import mlx, write_adapter

from lora_cli.artifacts.foreign_file import read_foreign
from lora_cli.artifacts.foreign_mlx import read_mlx
from lora_cli.errors import UserError


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"fine_tune_type": "dora"}, "'dora'"),
        ({"fine_tune_type": "full"}, "'full'"),
        ({"lora_parameters": {"rank": 3}}, "that is None"),
        ({"lora_parameters": {"rank": 3, "scale": -1}}, "that is -1"),
        ({"lora_parameters": {"rank": 3, "scale": 1.0, "alpha": 16}}, '"scale" * "alpha"'),
        ({"lora_parameters": {"rank": 4, "scale": 1.0}}, "the rank that its config names, 4"),
        ({"lora_parameters": [1]}, "that is None"),
    ],
)
def test_another_meaning_is_refused(change: dict[str, object], text: str, tmp_path: Path) -> None:
    folder, _ = mlx(tmp_path)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UserError) as caught:
        read_mlx(read_foreign(folder), base=None, alpha=None)
    assert text in caught.value.problems[0].message


def test_magnitudes_and_experts_are_refused(tmp_path: Path) -> None:
    config = {"lora_parameters": {"rank": 2, "scale": 1.0}}
    a, b = torch.ones(3, 2), torch.ones(2, 5)
    folder = write_adapter(tmp_path, {"q.lora_a": a, "q.lora_b": b, "q.m": b[0]}, config)
    with pytest.raises(UserError, match=r"also holds q\.m"):
        read_mlx(read_foreign(folder), base=None, alpha=None)
    write_adapter(tmp_path, {"q.lora_a": torch.ones(4, 2, 3), "q.lora_b": torch.ones(4, 5, 2)})
    with pytest.raises(UserError, match="of several experts"):
        read_mlx(read_foreign(folder), base=None, alpha=None)


def test_a_table_is_told_by_its_name(tmp_path: Path) -> None:
    config = {"lora_parameters": {"rank": 2, "scale": 0.5}}
    tensors = {
        "model.embed_tokens.lora_a": torch.ones(7, 2),
        "model.embed_tokens.lora_b": torch.ones(2, 4),
    }
    found = read_mlx(read_foreign(write_adapter(tmp_path, tensors, config)), base=None, alpha=None)
    layer = found.layers["model.embed_tokens"]
    assert (layer.is_embedding, layer.scale, found.base_name) == (True, 0.5, None)
    assert (layer.A.shape, layer.B.shape) == ((2, 7), (4, 2))

"""State dicts of loralib."""

from pathlib import Path

import pytest
import torch
from foreign_adapters import write_adapter

from lora_cli.artifacts.foreign_file import Base, BaseLayer, read_foreign
from lora_cli.artifacts.foreign_loralib import read_loralib
from lora_cli.errors import UserError

BASE = Base(name="BASE", layers={"table": BaseLayer(kind="embedding", a=(7,), b=4)}, settings={})
TABLE = {"table.lora_A": torch.ones(2, 7), "table.lora_B": torch.ones(4, 2)}


def test_a_table_is_told_by_the_base(tmp_path: Path) -> None:
    found = read_loralib(read_foreign(write_adapter(tmp_path, TABLE)), base=BASE, alpha=8.0)
    assert (found.layers["table"].is_embedding, found.layers["table"].scale) == (True, 4.0)


def test_biases_and_heads_are_not_left_out_silently(tmp_path: Path) -> None:
    tensors = {**TABLE, "q.bias": torch.ones(3)}
    with pytest.raises(UserError, match=r"also holds q\.bias"):
        read_loralib(read_foreign(write_adapter(tmp_path, tensors)), base=BASE, alpha=8.0)

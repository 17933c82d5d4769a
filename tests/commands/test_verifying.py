"""How a merged model is compared: what is asked for, or what fits into memory and says why."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lora_cli.artifacts.tensor_files import StoredWeights, read_weights
from lora_cli.commands import verifying
from lora_cli.commands.verifying import choose_way, knows_rows
from lora_cli.config.commands import TrainConfig
from lora_cli.config.merging import MergeConfig, TaskDataConfig
from lora_cli.config.sections import ModelConfig
from lora_cli.config.tasks import DataConfig, TextClassificationConfig

WITH_ROWS = TrainConfig(task=TextClassificationConfig(data=DataConfig(path="rows.jsonl")))


class Notes:
    """A display that keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)


@pytest.fixture
def weights(tmp_path: Path) -> StoredWeights:
    save_file({"w": torch.zeros(1000).bfloat16()}, tmp_path / "model.safetensors")
    return read_weights(tmp_path)


@pytest.mark.parametrize("verify", ["logits", "layers", "none"])
def test_what_is_asked_for(weights: StoredWeights, verify: Any) -> None:
    notes: Any = Notes()
    assert choose_way(MergeConfig(verify=verify), TrainConfig(), weights, notes) == verify
    assert notes.lines == []


def choose(
    weights: StoredWeights, config: MergeConfig, trained: TrainConfig
) -> tuple[str, list[str]]:
    notes: Any = Notes()
    return choose_way(config, trained, weights, notes), notes.lines


def test_memory_decides(weights: StoredWeights, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verifying, "free_memory", lambda: 4000)
    assert choose(weights, MergeConfig(), WITH_ROWS) == ("logits", [])
    # In float32 it takes twice as much.
    wide = replace(WITH_ROWS, model=ModelConfig(dtype="float32"))
    way, (line,) = choose(weights, MergeConfig(), wide)
    assert way == "layers"
    assert line.startswith("verify=layers, since the model takes")
    monkeypatch.setattr(verifying, "free_memory", lambda: None)
    assert choose(weights, MergeConfig(), wide) == ("logits", [])


def test_without_rows_tensors_are_compared(weights: StoredWeights) -> None:
    found = choose(weights, MergeConfig(check_rows=0), WITH_ROWS)
    assert found == ("layers", ["verify=layers, since check_rows is 0"])
    way, (line,) = choose(weights, MergeConfig(), TrainConfig())
    assert way == "layers"
    assert "does not know where its rows are" in line
    assert not knows_rows(MergeConfig(), TrainConfig())
    more = MergeConfig(task=TaskDataConfig(data=DataConfig(path="x.jsonl")))
    assert knows_rows(more, TrainConfig())

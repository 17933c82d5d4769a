"""Rules for every program: what they say, where the table of cases does not tell."""

import json
from pathlib import Path

import pytest
import torch
from stranger_adapters import PREFIX, factors, findings, ids, write_adapter

from lora_cli.artifacts.portability_common import is_path


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("bert-base-uncased", False),
        ("org/model-1.5_b", False),
        ("/data/model", True),
        ("./model", True),
        ("../model", True),
        ("~/model", True),
        ("runs/a/base", True),
        ("C:\\models\\a", True),
        ("models\\a", True),
        ("D:/a", True),
    ],
)
def test_paths_are_told_from_ids(name: str, expected: bool, tmp_path: Path) -> None:
    assert is_path(name) == expected
    folder = write_adapter(tmp_path / "a", base_model_name_or_path=name)
    assert ids(folder) == ({"base.local"} if expected else set())
    assert ids(folder, "vllm") == set()


def test_own_format_of_other_strategies(tmp_path: Path) -> None:
    (tmp_path / "tuned.safetensors").write_bytes(b"")
    found = findings(tmp_path)
    assert [x.id for x in found] == ["config.unreadable"]
    assert "lora-cli alone reads" in found[0].text


@pytest.mark.parametrize("labels", [["bad", "good", "so"], ["bad", "good"]])
def test_labels_are_told_where_they_are_known(labels: list[str], tmp_path: Path) -> None:
    head = {f"{PREFIX}classifier.out_proj.weight": torch.ones(3, 8)}
    folder = write_adapter(
        tmp_path / "a", {**factors(), **head}, task_type="SEQ_CLS", modules_to_save=["classifier"]
    )
    (folder / "lora_cli.json").write_text(json.dumps({"state": {"labels": labels}}))
    (found,) = (x for x in findings(folder, "peft") if x.id == "head.labels")
    assert "num_labels=3" in found.fix
    assert ("1: 'good', 2: 'so'" in found.fix) == (len(labels) == 3)


def test_convolution_in_groups_is_sound(tmp_path: Path) -> None:
    layer = f"{PREFIX}conv.lora_"
    tensors = {f"{layer}A.weight": torch.ones(4, 2, 3), f"{layer}B.weight": torch.ones(8, 2, 1)}
    assert ids(write_adapter(tmp_path / "a", tensors, target_modules=["conv"]), "peft") == set()

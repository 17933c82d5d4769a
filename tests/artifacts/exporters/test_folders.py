"""Folders of PEFT and transformers."""

from dataclasses import replace
from pathlib import Path

import torch
import transformers
from tiny_encoders import make_batch

from lora_cli.artifacts.exporters.contract import ExportInputs
from lora_cli.artifacts.exporters.folders import export_hf, export_peft


def test_peft_copies_files_but_no_links(inputs: ExportInputs, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    export_peft(replace(inputs, output=folder))
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "adapter_config.json"]


def test_hf_is_read_by_transformers(inputs: ExportInputs, tmp_path: Path) -> None:
    folder = tmp_path / "merged"
    export_hf(replace(inputs, output=folder))
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    batch = make_batch(inputs.model, 3, 11)
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, inputs.model(**batch).logits)

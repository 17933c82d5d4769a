"""What the tests of each format start from."""

from collections.abc import Callable
from pathlib import Path

import pytest
import transformers
from tiny_encoders import LABELS, make_model

from lora_cli.artifacts.exporters.contract import ExportInputs


@pytest.fixture
def inputs(tiny_model_dir: Callable[..., Path], tmp_path: Path) -> ExportInputs:
    """A random BERT with three labels, and an adapter folder with a link in it."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model_dir())
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    (adapter / "README.md").write_text("card")
    (adapter / "link").symlink_to("/etc/hostname")
    return ExportInputs(
        adapter_folder=adapter,
        model=make_model("bert", len(tokenizer)),
        processor=tokenizer,
        labels=LABELS,
        max_length=48,
        output=tmp_path / "out" / "model.onnx",
    )

"""What the tests of each format start from."""

from collections.abc import Callable
from pathlib import Path

import pytest
import transformers
from tiny_encoders import LABELS, make_model

from lora_cli.artifacts.exporters.contract import ExportInputs


@pytest.fixture(scope="session")
def make_inputs(tiny_model_dir: Callable[..., Path]) -> Callable[[Path], ExportInputs]:
    """Function: a random BERT with three labels, and an adapter folder with a link in it."""

    def make(folder: Path) -> ExportInputs:
        tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model_dir())
        adapter = folder / "adapter"
        adapter.mkdir()
        (adapter / "adapter_config.json").write_text("{}")
        (adapter / "README.md").write_text("card")
        (adapter / "link").symlink_to("/etc/hostname")
        (folder / "out").mkdir()
        return ExportInputs(
            adapter_folder=adapter,
            model=make_model("bert", len(tokenizer)),
            processor=tokenizer,
            labels=LABELS,
            max_length=48,
            output=folder / "out" / "model.onnx",
        )

    return make


@pytest.fixture
def inputs(make_inputs: Callable[[Path], ExportInputs], tmp_path: Path) -> ExportInputs:
    """The same for one test."""
    return make_inputs(tmp_path)

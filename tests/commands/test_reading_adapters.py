"""Adapters that do not fit their base, or say too little."""

from pathlib import Path
from typing import Any

import pytest
import transformers
from foreign_adapters import fails, kohya, loralib, torchtune

from lora_cli.commands.reading_adapters import find_adapter

# peft asks a transformers model for an attribute that has another name now.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")


def test_a_run_directory_means_its_adapter(tiny_run: Any, tmp_path: Path) -> None:
    assert find_adapter(str(tiny_run.path)) == tiny_run.path / "adapter"
    assert find_adapter(str(tiny_run.path / "adapter")) == tiny_run.path / "adapter"
    assert find_adapter(str(tmp_path)) == tmp_path


def test_a_base_that_does_not_fit_is_refused(
    written_by_peft: Path, llama: Path, convert: Any, tmp_path: Path
) -> None:
    adapter, _ = loralib(tmp_path / "in")
    fails(convert(adapter), "convert.no-base", "error[convert.no-scale]")
    fails(convert(adapter, f"base={llama}"), "convert.no-scale")
    fails(convert(written_by_peft, "alpha=4"), "convert.scale-twice")
    fails(convert(adapter, "alpha=1", "base=./none"), "model.no-such-folder", "`base`")
    config = transformers.GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=20)
    other = tmp_path / "other"
    transformers.GPT2LMHeadModel(config).save_pretrained(other)
    fails(convert(adapter, "alpha=1", f"base={other}"), "convert.unknown-layer", "q_proj")
    fails(convert(torchtune(tmp_path / "tune")[0]), "convert.no-base")
    fails(convert(tmp_path / "tune", f"base={other}"), "convert.unsupported", "gpt2")
    fails(convert(kohya(tmp_path / "kohya")[0]), "convert.no-base")
    fails(convert(tmp_path / "kohya", f"base={other}"), "convert.unknown-layer")
    assert not (tmp_path / "out").exists()

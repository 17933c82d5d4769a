"""The formats of PEFT and transformers, which are folders."""

import shutil
from pathlib import Path
from typing import Any

from lora_cli.artifacts.exporters.contract import ExportInputs, Reading
from lora_cli.artifacts.merged import write_merged
from lora_cli.models.base import load_base
from lora_cli.models.sources import resolve_model


def export_peft(inputs: ExportInputs) -> None:
    """Copy the adapter folder; links are left out, since they may lead anywhere."""
    inputs.output.mkdir()
    for path in sorted(inputs.adapter_folder.iterdir()):
        if path.is_file() and not path.is_symlink():
            shutil.copyfile(path, inputs.output / path.name)


def export_hf(inputs: ExportInputs) -> None:
    """Write the merged model and its processor as an ordinary transformers folder."""
    write_merged(inputs.model, inputs.processor, inputs.output)


def read_hf(path: Path, reading: Reading) -> Any:
    """Load a folder of transformers as a program would that knows nothing else."""
    source = resolve_model(str(path), processor=None)
    return load_base(source, auto_class=reading.auto_class, options={}, dtype="auto", seed=0).model

"""A base model that a run makes for itself, by merging the adapter that it starts from.

It stands in ``base/`` of the run: the new adapter belongs to that and not to the model that the
first one was trained on, and its record says so.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_cli.artifacts.adapter import MERGED_BASE
from lora_cli.artifacts.commit import put_in_place, staged_beside
from lora_cli.artifacts.merged import write_merged
from lora_cli.commands.continuing import Start
from lora_cli.commands.converting import as_folder
from lora_cli.commands.merging import Probe, take_probe
from lora_cli.commands.opening import open_adapter
from lora_cli.config.commands import TrainConfig
from lora_cli.data.types import Splits
from lora_cli.models.sources import ModelSource, check_sha256, resolve_model
from lora_cli.tasks.heads import load_with_head
from lora_cli.tasks.table import FAMILIES

# Rows on which a merged base is compared with the adapter that it came from.
_PROBE_ROWS = 32


@contextmanager
def base_staged(path: Path, start: Start | None, *, resume: bool) -> Iterator[Path | None]:
    """Give a folder for a merged base until the run directory is ready to take it.

    Args:
        path: The run directory.
        start: What the run starts from.
        resume: Whether the run has its base already; that folder is given then.
    """
    if start is None or not start.is_merged:
        yield None
    elif resume and (path / MERGED_BASE).is_dir():
        yield path / MERGED_BASE
    else:
        with staged_beside(path) as staged:
            yield staged / MERGED_BASE


def merge_base(
    start: Start, source: ModelSource, folder: Path, config: TrainConfig, splits: Splits
) -> tuple[ModelSource, Probe | None]:
    """Write adapter and base as one model, unless it is there, and return it.

    Without the head where that starts anew. Where it does not, what the adapter says about some
    rows comes with it, for `check_same` with the model as it is read back.
    """
    if not folder.is_dir():
        opened = open_adapter(start.name, base=str(source.place))
        model, probe = opened.attach(), None
        same_head = start.same_head(splits)
        # Quantizing makes it another model.
        if same_head and config.model.quantization == "none":
            task = opened.family.build(config.task, splits.state, opened.processor)
            features = [task.encode(row) for row in splits.rows["train"][:_PROBE_ROWS]]
            probe = take_probe(task, model, features, split="train")
        opened.merge()
        body: Any = model.cpu() if same_head else model.cpu().base_model
        # transformers writes in the first of several processes only; each reads its own here.
        body.should_save_on_this_rank = lambda _: True
        more = {} if start.same_family else _beside(body, source, config, splits)
        folder.mkdir()
        write_merged(body, opened.processor, folder, more=more)
        return replace(_written(folder), name=f"{start.name}, merged"), probe
    written = json.loads((folder.parent / "environment.json").read_bytes())
    merged = _written(folder)
    check_sha256(merged, written["base"]["sha256"])
    return replace(merged, name=f"{start.name}, merged"), None


def _written(folder: Path) -> ModelSource:
    return resolve_model(str(folder), processor=None)


def _beside(
    body: nn.Module, source: ModelSource, config: TrainConfig, splits: Splits
) -> dict[str, torch.Tensor]:
    """Return the tensors of a base that the task of the run reads, but not that of the adapter.

    Args:
        body: That of the model that the adapter was merged into.
        source: The base of the adapter.
        config: Of the run.
        splits: Its rows.
    """
    base = load_with_head(
        as_folder(source),
        FAMILIES[config.task.family],
        splits.state,
        dtype=config.model.dtype,
        seed=config.seed,
    )
    prefix, known = f"{base.model.base_model_prefix}.", body.state_dict()
    return {
        name: tensor
        for name, tensor in base.model.base_model.state_dict().items()
        if name not in known and prefix + name not in base.new_keys
    }


def install_base(source: ModelSource, path: Path) -> ModelSource:
    """Move a merged base from where it was staged into the run directory; return its new place."""
    place = path / MERGED_BASE
    if source.folder == place:
        return source
    put_in_place(source.folder, place)
    return replace(source, folder=place)


def merged_record(start: Start, source: ModelSource, path: Path) -> dict[str, Any]:
    """Return what the record of the new adapter says of its base."""
    return {
        "name": str((path / MERGED_BASE).absolute()),
        "revision": None,
        **source.hashes,
        "folder": MERGED_BASE,
        "merged": {"adapter": Path(start.name).resolve().name, "base": dict(start.record.base)},
    }

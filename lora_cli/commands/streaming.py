"""Merging tensor by tensor over the files of the base, without building the model."""

import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from shutil import copyfile, copytree
from time import monotonic
from typing import Any

import torch

from lora_cli.artifacts.adapter import Adapter, AdapterRecord, Subject
from lora_cli.artifacts.commit import put_in_place, staged_beside, sync_path
from lora_cli.artifacts.merge_names import FAMILIES, CannotStreamError, plan_by_names
from lora_cli.artifacts.merge_plan import Piece, Shard, arrange, cast
from lora_cli.artifacts.merge_stream import Streamed, write_shards
from lora_cli.artifacts.merged import folder_bytes, follow_umask
from lora_cli.artifacts.peft_format import PeftAdapter
from lora_cli.artifacts.room import check_output_space, make_room
from lora_cli.artifacts.tensor_files import StoredWeights, read_weights
from lora_cli.commands.display import Display
from lora_cli.commands.locating import check_base_weights
from lora_cli.config.commands import TrainConfig
from lora_cli.config.merging import MergeConfig
from lora_cli.config.size import parse_size
from lora_cli.models.integrity import MANIFEST, write_manifest
from lora_cli.models.sources import ModelSource, check_unchanged
from lora_cli.models.weights import INDEX, combine_hashes

# What stands beside the weights of a model and belongs to it.
_BESIDE = (".json", ".txt", ".model", ".spm", ".jinja", ".tiktoken", ".bpe")
_TEMPLATES = "additional_chat_templates"


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What is to be merged, of which nothing but headers and the adapter has been read.

    Attributes:
        subject: Where the adapter and its run are.
        adapter: Settings and tensors.
        record: What the adapter folder says about itself.
        trained: The configuration that it was trained with.
        source: The base model on disk; its weights are not hashed yet.
    """

    subject: Subject
    adapter: Adapter
    record: AdapterRecord
    trained: TrainConfig
    source: ModelSource


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What will be written.

    Attributes:
        shards: The files of weights.
        weights: The headers of the base.
        dtype: The number format of most of the merged weights.
        write_settings: Writes what stands beside the weights.
    """

    shards: Sequence[Shard]
    weights: StoredWeights
    dtype: torch.dtype
    write_settings: Callable[[Path], None]


def plan_merge(request: Request, weights: StoredWeights, config: MergeConfig) -> Plan:
    """Say where each tensor of the merged model comes from.

    Args:
        request: What is to be merged.
        weights: The headers of the base.
        config: The settings.

    Raises:
        CannotStreamError: If the model is needed for that.
        UserError: If the adapter does not fit the base.
    """
    dtype = weights.main_dtype if config.dtype == "auto" else getattr(torch, config.dtype)
    pieces, write_settings = _pieces(request, weights, dtype)
    if config.dtype != "auto":
        pieces = cast(pieces, dtype)
    limit = None if config.max_shard_size is None else parse_size(config.max_shard_size)
    return Plan(
        shards=arrange(pieces, weights, max_bytes=limit),
        weights=weights,
        dtype=dtype,
        write_settings=write_settings,
    )


def _pieces(
    request: Request, weights: StoredWeights, dtype: torch.dtype
) -> tuple[list[Piece], Callable[[Path], None]]:
    source, adapter = request.source, request.adapter
    settings = json.loads((source.folder / "config.json").read_bytes())
    if request.trained.task.family in FAMILIES and isinstance(adapter, PeftAdapter):
        try:
            pieces = plan_by_names(adapter, weights, settings, request.subject.adapter)
        except CannotStreamError:
            # Only the model tells then.
            pass
        else:
            return pieces, lambda folder: _copy_settings(source.folder, folder, settings, dtype)
    from lora_cli.commands.outline import outline

    found = outline(
        source,
        adapter,
        request.record,
        request.trained,
        weights,
        where=request.subject.adapter,
    )
    return found.pieces, lambda folder: found.write_settings(folder, dtype)


def _copy_settings(base: Path, folder: Path, settings: dict[str, Any], dtype: torch.dtype) -> None:
    """Copy what stands beside the weights; the number format in the settings is that of these."""
    for path in sorted(base.iterdir()):
        known = path.suffix in _BESIDE or path.name.startswith("LICENSE")
        if path.is_file() and known and path.name not in (INDEX, MANIFEST, "config.json"):
            copyfile(path, folder / path.name)
    if (base / _TEMPLATES).is_dir():
        copytree(base / _TEMPLATES, folder / _TEMPLATES)
    name = str(dtype).removeprefix("torch.")
    key = "torch_dtype" if "torch_dtype" in settings else "dtype"
    if settings.get(key) == name:
        copyfile(base / "config.json", folder / "config.json")
        return
    text = json.dumps({**settings, key: name}, indent=2, ensure_ascii=False)
    (folder / "config.json").write_text(f"{text}\n", encoding="utf-8")


def write_merge(
    request: Request,
    plan: Plan,
    output: Path,
    *,
    check: Callable[[Path], dict[str, Any]],
    sync: bool,
    display: Display,
) -> dict[str, Any]:
    """Write the merged model as a whole, once it was compared, and return the result.

    Args:
        request: What is merged.
        plan: What is written.
        output: Folder to make or replace.
        check: Compares what was written, before it is put in place; raises to refuse it.
        sync: Whether to wait until the disk holds it.
        display: Shown how far it is.

    Raises:
        UserError: If the base is not the one recorded; nothing is written then.
        OSError: If reading or writing failed.
        StorageError: If there is no room.
    """
    sizes = [sum(piece.num_bytes for piece in shard.pieces) for shard in plan.shards]
    make_room(output)
    check_output_space(output, sizes)
    began = monotonic()
    with ThreadPoolExecutor(1) as syncing, staged_beside(output) as staged:

        def written(path: Path) -> None:
            if sync:
                syncing.submit(sync_path, path)

        with display.transfer("merge", sum(sizes)) as advance:
            streamed = write_shards(
                plan.shards,
                plan.weights,
                request.source.folder,
                staged,
                written=written,
                advance=advance,
            )
        _check_base(request, streamed)
        plan.write_settings(staged)
        write_manifest(staged, streamed.written)
        follow_umask(staged)
        rate = streamed.num_bytes / max(monotonic() - began, 1e-9)
        display.note(f"merged tensor by tensor: {rate / 1e6:,.0f} MB/s")
        result = check(staged)
        put_in_place(staged, output, sync=sync)
    size = folder_bytes(output)
    name = str(plan.dtype).removeprefix("torch.")
    display.note(f"merged model: {output} ({size / 1e6:.1f} MB, {name})")
    return {"output": str(output), "dtype": name, **result, "bytes": size}


def _check_base(request: Request, streamed: Streamed) -> None:
    """Refuse a base that is not the one recorded, as far as that is known by now only."""
    source = replace(request.source, sha256=combine_hashes(streamed.base))
    check_unchanged(source, streamed.base)
    check_base_weights(source, request.record, request.subject)


def read_headers(source: ModelSource) -> StoredWeights:
    """Read the headers of a base.

    Raises:
        CannotStreamError: If its files are of another kind.
    """
    if source.gguf is not None:
        raise CannotStreamError("the base is a GGUF file")
    try:
        return read_weights(source.folder)
    except (ValueError, KeyError, TypeError) as error:
        raise CannotStreamError(f"the files of the base are unusual ({error})") from None

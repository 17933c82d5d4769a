"""A base model without numbers, the adapter in it, and what that says of each tensor of its files.

The same code puts the adapter in as for a model with numbers, with all its checks, so that heads,
added tokens and shared tensors come out as they do there.
"""

from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from shutil import copyfile
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig

from lora_cli.artifacts.adapter import RECORD, Adapter, AdapterRecord
from lora_cli.artifacts.merge_names import CannotStreamError
from lora_cli.artifacts.merge_plan import Piece
from lora_cli.artifacts.peft_format import PeftAdapter
from lora_cli.artifacts.tensor_files import NAMES, Stored, StoredWeights
from lora_cli.commands.attaching import attach_adapter, make_ready
from lora_cli.commands.opening import bind
from lora_cli.config.commands import TrainConfig
from lora_cli.lora.layer import AdapterLayer, SharedTensors
from lora_cli.lora.tensor_changes import NoChangeError, changes_of
from lora_cli.lora.tokens import TiedTokens
from lora_cli.lora.updates import Change, Replaced, SomeRows
from lora_cli.models.architecture import load_architecture
from lora_cli.models.base import BaseModel, silence
from lora_cli.models.processors import agree_with, load_processor
from lora_cli.models.sources import ModelSource
from lora_cli.models.stored_names import StoredNames, UnknownNamesError, name_stored
from lora_cli.tasks.table import FAMILIES

_BASE = "base_layer."
_GENERATION = "generation_config.json"


@dataclass(frozen=True, slots=True)
class Outline:
    """A merged model that is not written yet.

    Attributes:
        pieces: Its tensors.
        model: The model without numbers, whose settings are those of the merged one.
        processor: What is saved beside it.
        generation: Settings of generation as the base has them, to tell whether they are others.
        folder: The base's.
    """

    pieces: list[Piece]
    model: Any
    processor: Any
    generation: Mapping[str, Any]
    folder: Path

    def write_settings(self, folder: Path, dtype: torch.dtype) -> None:
        """Write what stands beside the weights, as `save_pretrained` does."""
        model = self.model
        model.config.dtype = str(dtype).removeprefix("torch.")
        model.config.architectures = [type(model).__name__]
        with silence():
            model.config.save_pretrained(folder)
            is_same = _generation(model) == self.generation
            if is_same and (self.folder / _GENERATION).is_file():
                copyfile(self.folder / _GENERATION, folder / _GENERATION)
            elif model.can_generate():
                model.generation_config.save_pretrained(folder)
            self.processor.save_pretrained(folder)


def outline(
    source: ModelSource,
    adapter: Adapter,
    record: AdapterRecord,
    config: TrainConfig,
    weights: StoredWeights,
    *,
    where: Path,
) -> Outline:
    """Say of each tensor of the merged model where it comes from.

    Args:
        source: The base.
        adapter: What was trained.
        record: What its folder says of itself.
        config: What it was trained with.
        weights: The headers of the base.
        where: The adapter's folder.

    Raises:
        CannotStreamError: If that cannot be said of one of them.
        UserError: If the adapter does not fit the base.
    """
    family = FAMILIES[config.task.family]
    processor = load_processor(source, family.processor)
    processor, _ = bind(family, config, record, processor, where=where / RECORD)
    options = family.model_options(record.state)
    built = load_architecture(source, auto_class=family.auto_class, options=options)
    if not built.has_head:
        raise CannotStreamError("the architecture has no head of this task")
    model = built.model
    if config.model.dtype != "auto":
        model.to(getattr(torch, config.model.dtype))
    names = _name(model, weights)
    provided = _provided(model, names, weights)
    new = [n for n, _ in model.named_parameters() if n not in provided]
    new_keys = tuple(sorted(set(new) - set(names.converted.values())))
    family.fit_model(model, record.state)
    # A model that is built of its config.json alone does not know them.
    if (source.folder / _GENERATION).is_file() and model.can_generate():
        with silence():
            model.generation_config = GenerationConfig.from_pretrained(source.folder)
    generation = _generation(model)
    agree_with(processor, model, source)
    make_ready(model, processor, adapter, config, where=str(where))
    before = _sharing(model)
    attach_adapter(BaseModel(model, new_keys), adapter, config, where=str(where))
    changes = dict(_changes(model, adapter))
    _take_out(model, changes)
    plan = _Plan(names, provided, weights, changes, before, _sharing(model))
    return Outline(list(plan.pieces(model)), model, processor, generation, source.folder)


def _generation(model: Any) -> dict[str, Any]:
    return deepcopy(model.generation_config.to_dict()) if model.can_generate() else {}


def _name(model: Any, weights: StoredWeights) -> StoredNames:
    shapes = {name: tensor.shape for name, tensor in weights.tensors.items()}
    try:
        return name_stored(model, shapes)
    except UnknownNamesError as error:
        raise CannotStreamError(f"transformers does not tell how it renames ({error})") from None


def _provided(model: Any, names: StoredNames, weights: StoredWeights) -> dict[str, Stored]:
    """Return the tensor of the files that each tensor of the model comes from, shared ones too."""
    found = {name: weights.tensors[file] for file, name in names.plain.items()}
    for group in _sharing(model).values():
        there = [found[name] for name in group if name in found]
        if there:
            found |= {name: there[0] for name in group if name not in found}
    return found


def _sharing(model: nn.Module) -> dict[int, list[str]]:
    """Return the names of each tensor of a model, by its identity."""
    groups: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        groups.setdefault(id(tensor), []).append(name)
    return groups


def _changes(model: nn.Module, adapter: Adapter) -> Iterator[tuple[str, Change]]:
    """Yield what becomes of tensors of the merged model, by name."""
    tokens = adapter.tokens if isinstance(adapter, PeftAdapter) else {}
    own: set[str] = set()
    for name, layer in model.named_modules():
        if isinstance(layer, SharedTensors):
            own |= {f"{name}.{leaf}" for leaf, _ in layer.named_buffers()}
        if not isinstance(layer, AdapterLayer):
            continue
        own |= {f"{name}.{leaf}" for leaf in layer.own_tensors()}
        # One that is within another is part of what becomes of that; a follower has no tensors.
        if f".{_BASE}" in f"{name}." or isinstance(layer, TiedTokens):
            continue
        try:
            yield from changes_of(layer, name, adapter.state.__getitem__, tokens)
        except (NoChangeError, KeyError) as error:
            raise CannotStreamError(f"{name} {error}") from None
    for name, tensor in adapter.state.items():
        if name not in own:
            yield name.replace(_BASE, ""), Replaced(tensor)


def _take_out(model: nn.Module, changes: Mapping[str, Change]) -> None:
    """Take the adapters out again, in place; what they changed is a tensor of its own then.

    Tensors that were trained themselves, whole or in rows, stay shared as they are.
    """
    for name, layer in reversed(list(model.named_modules(remove_duplicate=False))):
        parent, _, last = name.rpartition(".")
        if isinstance(layer, AdapterLayer):
            setattr(model.get_submodule(parent), last, layer.base_layer)
        elif isinstance(layer, SharedTensors):
            delattr(model.get_submodule(parent), last)
    for name, change in changes.items():
        if not isinstance(change, Replaced | SomeRows):
            path, _, leaf = name.rpartition(".")
            module = model.get_submodule(path)
            empty = torch.empty_like(getattr(module, leaf))
            setattr(module, leaf, nn.Parameter(empty, requires_grad=False))


@dataclass(frozen=True, slots=True)
class _Plan:
    """What is known of the tensors of a merged model.

    Attributes:
        names: Names in model and files.
        provided: The tensors of the files by names in the model.
        weights: The headers of the base.
        changes: What becomes of tensors, by names in the model.
        before: Which names the tensors of the base have.
        after: Which names those of the merged model have.
    """

    names: StoredNames
    provided: Mapping[str, Stored]
    weights: StoredWeights
    changes: Mapping[str, Change]
    before: Mapping[int, list[str]]
    after: Mapping[int, list[str]]

    def pieces(self, model: Any) -> Iterator[Piece]:
        """Yield the tensors of the merged model, those of the files first and in their order."""
        self._check_changes()
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        groups = {name: tuple(group) for group in self.after.values() for name in group}
        written: set[str] = set()
        for file, stored in self.weights.tensors.items():
            if file in self.names.converted:
                yield Piece(file, stored.kind, stored.shape, stored)
            elif (name := self.names.plain.get(file)) is not None:
                yield self._piece(self.names.written[file], groups[name], shapes[name], stored)
                written |= set(groups[name])
        converted = set(self.names.converted.values())
        for group in dict.fromkeys(groups.values()):
            if written.isdisjoint(group) and converted.isdisjoint(group):
                there = next((self.provided[n] for n in group if n in self.provided), None)
                yield self._piece(group[0], group, shapes[group[0]], there)
        self._untie(model)

    def _check_changes(self) -> None:
        for name in self.changes:
            if name in self.names.converted.values():
                raise CannotStreamError(f"{name} is no tensor of the files as it is")

    def _piece(
        self, name: str, group: tuple[str, ...], shape: tuple[int, ...], stored: Stored | None
    ) -> Piece:
        change = next((self.changes[n] for n in group if n in self.changes), None)
        if stored is None:
            if not isinstance(change, Replaced) or not change.value.is_floating_point():
                raise CannotStreamError(f"{name} is not in the files")
            return Piece(name, NAMES[self.weights.main_dtype], shape, None, change)
        if change is None:
            if stored.shape != shape:
                raise CannotStreamError(f"{name} is of another shape in the files")
            return Piece(name, stored.kind, shape, stored)
        files = [file for file, known in self.names.plain.items() if known in group]
        if stored.dtype is None or (change.reads_old and len(files) > 1):
            raise CannotStreamError(f"{name} is stored as {stored.kind}, or twice")
        grown = range(stored.shape[0], shape[0]) if shape else range(0)
        fits = stored.shape[1:] == shape[1:] and stored.shape[:1] <= shape[:1]
        is_known = isinstance(change, Replaced) or (
            fits and (not grown or (isinstance(change, SomeRows) and {*grown} <= {*change.trained}))
        )
        if not is_known:
            raise CannotStreamError(f"{name} is of another shape in the files")
        return Piece(name, stored.kind, shape, stored, change)

    def _untie(self, model: Any) -> None:
        """Change the settings where tensors were shared and no longer are."""
        was = {tuple(group) for group in self.before.values() if len(group) > 1}
        now = {tuple(group) for group in self.after.values() if len(group) > 1}
        split = {name for group in was - now for name in group}
        if not split:
            return
        for config in (model.config, model.config.get_text_config()):
            config.tie_word_embeddings = False
        with silence(), torch.device("meta"):
            again = type(model)(model.config)
        tied = [group for group in _sharing(again).values() if len(set(group) & split) > 1]
        if tied:
            raise CannotStreamError(f"{tied[0][0]} and {tied[0][1]} are always shared")

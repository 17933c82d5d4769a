"""Opening base models and adapters: the steps that several commands share."""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_cli.artifacts.adapter import (
    RECORD,
    Adapter,
    AdapterRecord,
    Subject,
    find_subject,
    load_adapter,
)
from lora_cli.artifacts.peft_format import PeftAdapter
from lora_cli.commands.attaching import attach_adapter, make_ready
from lora_cli.commands.converting import as_folder
from lora_cli.commands.display import Display
from lora_cli.commands.encoding import encoding_facts
from lora_cli.commands.locating import base_path, check_base
from lora_cli.commands.new_rows import check_new_rows, check_no_new_rows
from lora_cli.commands.recorded import training_config
from lora_cli.config.commands import TrainConfig
from lora_cli.config.task_families import TaskConfig
from lora_cli.config.tasks import DataConfig
from lora_cli.data.types import Splits
from lora_cli.errors import Problem, UserError
from lora_cli.lora.merge import merge_lora
from lora_cli.lora.strategies import dtypes_of, round_to
from lora_cli.models.base import BaseModel, load_base
from lora_cli.models.folders import KEY as MODEL_KEY
from lora_cli.models.processors import agree_with, load_processor
from lora_cli.models.sources import ModelSource, resolve_model
from lora_cli.tasks.contract import Family, Task
from lora_cli.tasks.heads import load_with_head
from lora_cli.tasks.table import FAMILIES
from lora_cli.training.runtime import default_device


@dataclass(frozen=True, kw_only=True, slots=True)
class Opened:
    """An adapter and its base, with the adapter not yet in the model.

    Attributes:
        subject: Where the adapter and its run are.
        config: The configuration that it was trained with.
        record: What the adapter folder says about itself.
        adapter: Settings and tensors.
        source: The base model on disk.
        base: The base model in memory, on `device`, with the head as it was before training.
        dtypes: Its number formats as it was loaded.
        processor: The base model's: its tokenizer, or what takes the place of one.
        task: The task, ready to encode rows.
    """

    subject: Subject
    config: TrainConfig
    record: AdapterRecord
    adapter: Adapter
    source: ModelSource
    base: BaseModel
    dtypes: Mapping[str, torch.dtype]
    processor: Any
    task: Task

    @property
    def family(self) -> Family:
        """The task family."""
        return FAMILIES[self.config.task.family]

    @property
    def inputs(self) -> list[Path]:
        """The folders that a command must not replace."""
        return [self.subject.adapter, self.source.folder]

    def attach(self) -> nn.Module:
        """Put the adapter into the base model, strictly, and return it."""
        where = str(self.subject.adapter)
        model = attach_adapter(self.base, self.adapter, self.config, where=where)
        placed: nn.Module = model.to(default_device())
        return placed

    def load_again(self) -> nn.Module:
        """Load the base model once more, without the adapter."""
        loaded = load_with_head(
            as_folder(self.source),
            self.family,
            self.record.state,
            dtype=self.config.model.dtype,
            seed=self.config.seed,
        )
        model: nn.Module = loaded.model
        return model

    def merge(self) -> None:
        """Make the adapter, which `attach` has put in, part of the base weights, in place."""
        if isinstance(self.adapter, PeftAdapter):
            merge_lora(self.base.model)
        else:
            round_to(self.base.model, self.dtypes)

    def load_splits(self, data: DataConfig) -> tuple[Splits, Task]:
        """Read labelled rows, and return them with the task that encodes them.

        They are those that the adapter was trained and validated on, or those of `data` where it
        names a path.
        """
        config = self.config.task
        if data.path is not None:
            check_new_rows(data, config.family)
            config = replace(config, data=data)
            splits, state = self.family.load_more(config, self.record.state, seed=self.config.seed)
            return splits, self.family.build(config, state, self.processor)
        check_no_new_rows(data)
        if config.data.path is None:
            raise UserError(
                Problem(
                    id="adapter.no-data",
                    message="`task.data.path` must say where labelled rows are, since the adapter "
                    "folder does not.",
                    key="task.data.path",
                    fix="task.data.path=FILE",
                )
            )
        return self.family.load(config, seed=self.config.seed), self.task

    def with_task(self, settings: TaskConfig) -> "Opened":
        """Return the same with other settings of the task, which is built anew."""
        if settings == self.config.task:
            return self
        task = self.family.build(settings, self.record.state, self.processor)
        return replace(self, config=replace(self.config, task=settings), task=task)

    def encoding_facts(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Return what rows of a task with this state are encoded by."""
        return encoding_facts(self.config.task, state, self.processor, self.source)


def open_adapter(path: str, *, base: str | None, display: Display | None = None) -> Opened:
    """Read an adapter and load its base model.

    A base that was quantized for training is loaded as it was before: merging rounds once, to the
    stored number format.

    Args:
        path: Run or adapter directory.
        base: Where the base model is now; None goes by the adapter.
        display: Told where the base is not what the adapter was trained on.

    Raises:
        UserError: If anything is missing or damaged, or the base is not the one recorded.
    """
    subject = find_subject(path)
    adapter, record = load_adapter(subject.adapter)
    config = training_config(record, subject)
    source = resolve_model(
        base or base_path(config, record, subject),
        revision=config.model.revision,
        processor=FAMILIES[config.task.family].processor,
    )
    check_base(source, record, subject)
    if display is not None and config.model.quantization != "none":
        display.note(
            f"the adapter was trained on weights in {config.model.quantization}; the base is used "
            "here as it was before that"
        )
    family = FAMILIES[config.task.family]
    loading = as_folder(source, display)
    processor = load_processor(loading, family.processor)
    processor, task = bind(family, config, record, processor, where=subject.adapter / RECORD)
    loaded = load_with_head(
        loading, family, record.state, dtype=config.model.dtype, seed=config.seed
    )
    loaded.model.to(default_device())
    agree_with(processor, loaded.model, source)
    make_ready(loaded.model, processor, adapter, config, where=str(subject.adapter))
    return Opened(
        subject=subject,
        config=config,
        record=record,
        adapter=adapter,
        source=source,
        base=loaded,
        dtypes=dtypes_of(loaded.model),
        processor=processor,
        task=task,
    )


def bind(
    family: Family, config: TrainConfig, record: AdapterRecord, processor: Any, *, where: Path
) -> tuple[Any, Task]:
    """Return processor and task, from the state that the record holds, which has been tried."""
    try:
        family.model_options(record.state)
        processor = family.fit_processor(processor, record.state)
        return processor, family.build(config.task, record.state, processor)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            Problem(
                id="adapter.record",
                message=f"{RECORD} must hold what the task learned from its data, but "
                f"`state` cannot be used ({type(error).__name__}: {error}).",
                where=str(where),
                fix="use an adapter folder as `lora-cli train` wrote it",
            )
        ) from error


def load_merged(opened: Opened, path: str) -> Any:
    """Load a merged model from its folder alone, as any program would.

    Raises:
        UserError: If it cannot be loaded, or its head is not that of this adapter.
    """
    try:
        source = resolve_model(path, processor=opened.family.processor)
    except UserError as error:
        problems = [
            replace(problem, key="merged", message=problem.message.replace(MODEL_KEY, "merged"))
            for problem in error.problems
        ]
        raise UserError(problems) from error
    loaded = load_base(
        source,
        auto_class=opened.family.auto_class,
        options={},
        dtype="auto",
        seed=opened.config.seed,
    )
    labels = opened.family.model_options(opened.record.state).get("id2label")
    if loaded.new_keys or (labels is not None and loaded.model.config.id2label != labels):
        raise UserError(not_merged(path, "has another head", opened.subject))
    return loaded.model.to(default_device())


def not_merged(path: str, why: str, subject: Subject) -> Problem:
    """The model at `path` is not what `lora-cli merge` makes of the adapter of `subject`."""
    words = shlex.quote(str(subject.adapter)), shlex.quote(f"output={path}")
    return Problem(
        id="eval.not-merged",
        message=f"`merged` must be this adapter merged into its base, but {path} {why}.",
        key="merged",
        fix=f"lora-cli merge {words[0]} {words[1]}",
    )

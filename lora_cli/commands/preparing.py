"""Everything that `train` reads and checks before it writes anything."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lora_cli.commands.display import Display
from lora_cli.config.commands import TrainConfig
from lora_cli.data.types import Row, Splits
from lora_cli.errors import Problem, UserError
from lora_cli.lora.inject import freeze_base, inject_lora, saved_modules, trainable_parameters
from lora_cli.lora.targets import ResolvedTargets, resolve_targets
from lora_cli.models.base import check_vocabulary, load_base, load_tokenizer
from lora_cli.models.families import auto_targets
from lora_cli.models.sources import ModelSource, check_sha256, resolve_model
from lora_cli.tasks.contract import Features, Task
from lora_cli.tasks.table import FAMILIES


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """A run that is ready to start; nothing has been written.

    Attributes:
        splits: Checked rows.
        source: The base model on disk.
        tokenizer: The base model's.
        task: Bound to configuration, label names and tokenizer.
        model: The base, frozen, with adapters in place.
        module_names: Paths of all modules of the base, before adapters were put in.
        targets: Which layers got an adapter.
        saved: Modules that are trained and saved whole.
        train: Encoded training rows.
        validation: Encoded validation rows.
    """

    splits: Splits
    source: ModelSource
    tokenizer: Any
    task: Task
    model: nn.Module
    module_names: tuple[str, ...]
    targets: ResolvedTargets
    saved: tuple[str, ...]
    train: Sequence[Features]
    validation: Sequence[Features]


def prepare(config: TrainConfig, display: Display) -> Prepared:
    """Read data and model, put adapters in, encode the rows.

    Raises:
        UserError: With the problems of the data and those of the model together.
    """
    family = FAMILIES[config.task.family]
    splits, source = _load_inputs(config)
    for note in splits.notes:
        display.note(note)
    base = load_base(
        source,
        auto_class=family.auto_class,
        options=family.model_options(splits.state),
        dtype=config.model.dtype,
        seed=config.seed,
    )
    _check_length(config, base.model)
    tokenizer = load_tokenizer(source)
    check_vocabulary(tokenizer, base.model, source)
    task = family.build(config.task, splits.state, tokenizer)
    _note_coupling(task, config, display)

    saved = saved_modules(base.model, base.new_keys, config.lora.modules_to_save)
    targets = resolve_targets(
        base.model,
        targets=config.lora.targets,
        exclude=config.lora.exclude,
        auto=auto_targets(base.model.config.model_type),
        saved_modules=saved,
    )
    module_names = tuple(name for name, _ in base.model.named_modules())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        inject_lora(
            base.model,
            targets.names,
            r=config.lora.r,
            alpha=config.lora.alpha,
            dropout=config.lora.dropout,
        )
    freeze_base(base.model, saved)
    _show_model(display, base.model, source, targets, saved)

    rows = dict(splits.rows)
    if config.trainer.overfit_rows is not None:
        rows["train"] = rows["validation"] = rows["train"][: config.trainer.overfit_rows]
        display.note(f"overfit: training and validating on the same {len(rows['train'])} rows")
    return Prepared(
        splits=splits,
        source=source,
        tokenizer=tokenizer,
        task=task,
        model=base.model,
        module_names=module_names,
        targets=targets,
        saved=saved,
        train=encode_rows(task, rows["train"], "train", display),
        validation=encode_rows(task, rows["validation"], "validation", display),
    )


def _note_coupling(task: Task, config: TrainConfig, display: Display) -> None:
    if task.couples_rows and config.trainer.micro_batch_size is not None:
        display.note("the loss couples the rows of a batch: trainer.micro_batch_size changes it")


def encode_rows(task: Task, rows: Sequence[Row], name: str, display: Display) -> list[Features]:
    """Encode rows in order, and say how many were cut."""
    features = [task.encode(row) for row in display.track(f"encode {name}", rows)]
    cut = sum(bool(row.get("truncated")) for row in features)
    if cut:
        display.note(f"{name}: task.max_length cut {cut:,} of {len(rows):,} rows")
    return features


def _load_inputs(config: TrainConfig) -> tuple[Splits, ModelSource]:
    """Load rows and find the base model; report the problems of both at once."""
    problems: list[Problem] = []
    splits = source = None
    try:
        splits = FAMILIES[config.task.family].load(config.task, seed=config.seed)
    except UserError as error:
        problems += error.problems
    try:
        source = resolve_model(config.model.path or "", revision=config.model.revision)
        if config.model.sha256 is not None:
            check_sha256(source, config.model.sha256)
    except UserError as error:
        problems += error.problems
    if problems or splits is None or source is None:
        raise UserError(problems)
    return splits, source


def _check_length(config: TrainConfig, model: Any) -> None:
    """Refuse rows longer than the model has positions for."""
    positions = getattr(model.config, "max_position_embeddings", None)
    if isinstance(positions, int) and 0 < positions < config.task.max_length:
        raise UserError(
            Problem(
                id="task.max-length",
                message=f"`task.max_length` must be at most {positions}, the positions that the "
                f"model has, but is {config.task.max_length}.",
                key="task.max_length",
                allowed=f"4 to {positions}",
                fix=f"task.max_length={positions}",
            )
        )


def _show_model(
    display: Display,
    model: nn.Module,
    source: ModelSource,
    targets: ResolvedTargets,
    saved: Sequence[str],
) -> None:
    total = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in trainable_parameters(model).values())
    matched = ", ".join(f"{name} ({count})" for name, count in targets.counts.items())
    display.note(
        f"model: {source.name}, {total:,} parameters, {trained:,} trained "
        f"({100 * trained / total:.2f} %)"
    )
    display.note(f"adapters: {len(targets.names)} layers, {matched}; whole: {', '.join(saved)}")

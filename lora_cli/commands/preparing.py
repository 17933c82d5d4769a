"""Everything that `train` reads and checks before it writes anything."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_cli.commands.arranging import arrange_rows, leave_out
from lora_cli.commands.continuing import (
    Start,
    show_start,
    suit_labels,
    trained_again,
)
from lora_cli.commands.converting import as_folder
from lora_cli.commands.coupling import check_coupling
from lora_cli.commands.data_report import describe_rows, show_rows
from lora_cli.commands.display import Display
from lora_cli.commands.encoding import encode_splits, encoding_facts
from lora_cli.commands.lengths import check_length
from lora_cli.commands.locating import check_base
from lora_cli.commands.merged_base import merge_base
from lora_cli.commands.merging import show_same
from lora_cli.commands.padding import choose_padding
from lora_cli.commands.starting import planned_over, put_in_adapters
from lora_cli.config.commands import TrainConfig
from lora_cli.data.types import Row, Splits
from lora_cli.errors import Problem, UserError
from lora_cli.lora.coverage import count_parameters, describe_plan
from lora_cli.lora.inject import freeze_base, saved_modules
from lora_cli.lora.planning import AdapterPlan, plan_adapter
from lora_cli.lora.settings import LoraSettings
from lora_cli.lora.strategies import (
    WITH_LORA,
    Applied,
    apply_strategy,
    check_plain,
    dtypes_of,
    own_frozen,
)
from lora_cli.lora.targets import ResolvedTargets
from lora_cli.lora.tokens import prepare_tokens, put_tokens
from lora_cli.models.architecture import check_architecture
from lora_cli.models.base import BaseModel
from lora_cli.models.families import auto_targets
from lora_cli.models.processors import agree_with, load_processor, tokenizer_of
from lora_cli.models.quantization import check_quantization, quantize_base
from lora_cli.models.sources import ModelSource, check_sha256, resolve_model
from lora_cli.tasks.contract import Features, Task
from lora_cli.tasks.heads import load_with_head
from lora_cli.tasks.table import FAMILIES
from lora_cli.training.forward import check_forward
from lora_cli.training.optim import check_optimizer
from lora_cli.training.runtime import default_device

_NO_ADAPTERS = LoraSettings(r=1, alpha=1.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """A run that is ready to start; nothing has been written.

    Attributes:
        splits: Checked rows.
        source: The base model on disk.
        processor: The base model's: its tokenizer, or what takes the place of one.
        task: Bound to configuration, label names and processor.
        model: The base, frozen, with adapters in place.
        module_names: Paths of all modules of the base, before adapters were put in.
        targets: Which layers got an adapter.
        parameters: Names of fused weights with an adapter, as short as they can be.
        settings: Of the adapters in the model; EVA decides their ranks.
        saved: Modules that are trained and saved whole.
        tokens: Numbers of the tokens whose rows are trained, by path of the embedding.
        applied: What another strategy than low-rank updates has made of the model; None for these.
        dtypes: Number formats of the base as it was loaded.
        own_frozen: Parameters that the model never trains.
        same_head: Whether the head is that of `start`, where there is one.
        start: The adapter that the run starts from; its tensors are not in the model yet.
        train: Encoded training rows.
        validation: Encoded validation rows.
        report: What the rows are like; see `describe_rows`.
        padding_free: Whether the model trains without padding.
    """

    splits: Splits
    source: ModelSource
    processor: Any
    task: Task
    model: nn.Module
    module_names: tuple[str, ...]
    targets: ResolvedTargets
    parameters: tuple[str, ...]
    settings: LoraSettings
    saved: tuple[str, ...]
    tokens: Mapping[str, tuple[int, ...]]
    applied: Applied | None
    dtypes: Mapping[str, torch.dtype]
    own_frozen: frozenset[str]
    same_head: bool
    start: Start | None
    train: Sequence[Features]
    validation: Sequence[Features]
    report: Mapping[str, Any]
    padding_free: bool


def prepare(
    config: TrainConfig,
    display: Display,
    *,
    start: Start | None = None,
    staged: Path | None = None,
) -> Prepared:
    """Read data and model, put adapters in, encode the rows.

    Args:
        config: What to train.
        display: Told what was found.
        start: The adapter to start from, if any.
        staged: Where the base is, or is to be written, that `start` becomes part of.

    Raises:
        UserError: With the problems of the data and those of the model together.
        RunFailedError: If a base that `start` was merged into does not say what `start` says.
    """
    splits, source = _load_inputs(config, start, display)
    same_head = start is None or start.same_head(splits)
    if start is not None:
        show_start(display, start, config, same_head=same_head)
    probe = None
    if start is not None and staged is not None:
        source, probe = merge_base(start, source, staged, config, splits)
    base, processor, task = load_model(as_folder(source, display), config, splits.state)
    for note in base.notes:
        display.note(note)
    if probe is not None:
        show_same(probe, base.model.to(default_device()), display)
    names = tuple(name for name, _ in base.model.named_modules())
    dtypes, frozen = dtypes_of(base.model), own_frozen(base.model)
    used = replace(splits, rows=_rows_to_use(splits, config, display))
    if config.strategy.name in WITH_LORA:
        changed = _adapt(base, config, task, processor, start, used.rows["train"], source, display)
    else:
        changed = _apply(base, config, display)
    _show_model(display, base.model, source, changed)
    encoded = _encode(config, task, used, base.model, display, processor=processor, source=source)
    return Prepared(
        splits=splits,
        source=source,
        processor=processor,
        task=task,
        model=base.model,
        module_names=names,
        targets=changed.plan.targets,
        parameters=changed.plan.short_parameters,
        settings=planned_over(changed.settings, config, rows=len(encoded["train"])),
        saved=changed.plan.saved,
        tokens=changed.tokens,
        applied=changed.applied,
        dtypes=dtypes,
        own_frozen=frozen,
        same_head=same_head,
        start=start,
        padding_free=choose_padding(config, base.model, task, encoded["train"], display),
        **encoded,
    )


def _encode(
    config: TrainConfig,
    task: Task,
    splits: Splits,
    model: nn.Module,
    display: Display,
    *,
    processor: Any,
    source: ModelSource,
) -> dict[str, Any]:
    """Return `train`, `validation` and `report` of what is prepared."""
    facts = encoding_facts(config.task, splits.state, processor, source)
    check_coupling(task, config, display)
    rows = {split: splits.rows[split] for split in ("train", "validation")}
    encoded = {
        split: leave_out(features, split, display)
        for split, features in encode_splits(task, rows, display, facts=facts).items()
    }
    report = describe_rows(FAMILIES[config.task.family], splits, encoded)
    show_rows(display, report)
    train = arrange_rows(config, encoded["train"], model, display)
    return {**encoded, "train": train, "report": report}


def _rows_to_use(
    splits: Splits, config: TrainConfig, display: Display
) -> Mapping[str, tuple[Row, ...]]:
    count = config.trainer.overfit_rows
    if count is None:
        return splits.rows
    first = splits.rows["train"][:count]
    display.note(f"overfit: training and validating on the same {len(first)} rows")
    return {**splits.rows, "train": first, "validation": first}


def load_model(
    source: ModelSource, config: TrainConfig, state: Mapping[str, Any]
) -> tuple[BaseModel, Any, Task]:
    """Load the base with the head of the task, its processor, and the task bound to both."""
    family = FAMILIES[config.task.family]
    base = load_with_head(source, family, state, dtype=config.model.dtype, seed=config.seed)
    check_architecture(base.model.config, config.model)
    check_length(config, base.model)
    check_forward(base.model, config.trainer)
    processor = family.fit_processor(load_processor(source, family.processor), state)
    agree_with(processor, base.model, source)
    return base, processor, family.build(config.task, state, processor)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Changed:
    """What was put into a base model, as in `Prepared`."""

    plan: AdapterPlan
    settings: LoraSettings = _NO_ADAPTERS
    tokens: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    applied: Applied | None = None


def _adapt(
    base: BaseModel,
    config: TrainConfig,
    task: Task,
    processor: Any,
    start: Start | None,
    rows: Sequence[Row],
    source: ModelSource,
    display: Display,
) -> _Changed:
    """Put low-rank updates into the base; what `start` trained whole is trained so again."""
    model = base.model
    whole = (*config.lora.modules_to_save, *trained_again(start, model))
    plan = plan_adapter(
        model,
        replace(config.lora, modules_to_save=whole),
        new_keys=base.new_keys,
        auto=auto_targets(model.config.model_type),
        source=source.name,
    )
    tokens = prepare_tokens(
        model, tokenizer_of(processor), config.lora.trainable_tokens, seed=config.seed
    )
    _quantize(model, config, plan.saved, display)
    if config.strategy.name != "lora":
        check_plain(model, config.strategy)
    settings, plan = put_in_adapters(
        model, plan, task=task, rows=rows, config=config, display=display
    )
    put_tokens(model, tokens)
    freeze_base(model, plan.saved, bias=config.lora.bias)
    return _Changed(plan=plan, settings=settings, tokens=tokens)


def _apply(base: BaseModel, config: TrainConfig, display: Display) -> _Changed:
    """Make of the base what another strategy than low-rank updates trains."""
    new = saved_modules(base.model, base.new_keys, ())
    _quantize(base.model, config, new, display)
    applied = apply_strategy(base.model, config.strategy, new, seed=config.seed)
    plan = AdapterPlan(targets=ResolvedTargets((), {}), saved=applied.saved)
    return _Changed(plan=plan, applied=applied)


def _quantize(
    model: nn.Module, config: TrainConfig, saved: tuple[str, ...], display: Display
) -> None:
    kind = config.model.quantization
    if kind == "none":
        return
    found = quantize_base(model, kind, keep=saved)
    display.note(
        f"quantized: {found.layers} layers to {kind}, {found.bytes_before / 1e6:.1f} MB to "
        f"{found.bytes_after / 1e6:.1f} MB; merging takes them as they were"
    )


def _load_inputs(
    config: TrainConfig, start: Start | None, display: Display
) -> tuple[Splits, ModelSource]:
    """Load rows and find the base model; report the problems of both at once."""
    problems: list[Problem] = []
    splits = source = None
    family = FAMILIES[config.task.family]
    try:
        splits = family.load(config.task, seed=config.seed)
        if start is not None and (suited := suit_labels(start, splits, config)) is not config:
            splits = family.load(suited.task, seed=config.seed)
    except UserError as error:
        problems += error.problems
    try:
        source = resolve_model(
            config.model.path or "", revision=config.model.revision, processor=family.processor
        )
        if config.model.sha256 is not None:
            check_sha256(source, config.model.sha256)
        if start is not None:
            check_base(source, start.record, start.subject)
    except UserError as error:
        problems += error.problems
    for check, name in (
        (check_quantization, config.model.quantization),
        (check_optimizer, config.optimizer.name),
    ):
        try:
            check(name)
        except UserError as error:
            problems += error.problems
    if problems or splits is None or source is None:
        raise UserError(problems)
    for note in splits.notes:
        display.note(note)
    return splits, source


def _show_model(display: Display, model: nn.Module, source: ModelSource, changed: _Changed) -> None:
    total, trained = count_parameters(model)
    display.note(
        f"model: {source.name}, {total:,} parameters, {trained:,} trained "
        f"({100 * trained / total:.2f} %)"
    )
    if changed.applied is None:
        for text in describe_plan(changed.plan, changed.tokens):
            display.note(text)
    else:
        whole = ", ".join(changed.plan.saved) or "nothing"
        display.note(f"trained: {changed.applied.text}; whole: {whole}")

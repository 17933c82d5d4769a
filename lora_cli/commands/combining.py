"""Several adapters of one base and task made into one, for `lora-cli merge adapters=[...]`."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from statistics import mode
from typing import Any

from torch import nn

from lora_cli.artifacts.adapter import (
    RECORD,
    AdapterRecord,
    Subject,
    find_subject,
    load_adapter,
    save_adapter,
)
from lora_cli.artifacts.card import CardData, model_card
from lora_cli.artifacts.peft_format import PeftAdapter
from lora_cli.artifacts.peft_tensors import WEIGHTS_FILE
from lora_cli.artifacts.run_dir import PACKAGES
from lora_cli.commands.display import Display
from lora_cli.commands.opening import Opened, open_adapter
from lora_cli.commands.reporting import head_facts
from lora_cli.config.adapters import LoraConfig
from lora_cli.config.commands import TrainConfig
from lora_cli.config.decode import decode
from lora_cli.config.merging import MergeConfig
from lora_cli.config.schema import show, to_plain
from lora_cli.config.tasks import DataConfig
from lora_cli.errors import Problem, UserError
from lora_cli.lora.combine import Blend, combine_factors
from lora_cli.lora.factors import Factors, combine_saved, factor_state, few, read_factors
from lora_cli.lora.kinds import is_conv1d
from lora_cli.lora.layer import AdapterLayer
from lora_cli.lora.patterns import outermost
from lora_cli.lora.settings import LoraSettings
from lora_cli.tasks.table import FAMILIES


@dataclass(frozen=True, kw_only=True, slots=True)
class Combined:
    """A combination that is not written yet.

    Attributes:
        opened: The combination as if it had been read, its base without adapters.
        inputs: Folders that must not be replaced.
        parts: Name, weight and sha256 of each adapter.
    """

    opened: Opened
    inputs: Sequence[Path]
    parts: Sequence[tuple[str, float, str]]


def open_combined(config: MergeConfig, display: Display) -> Combined:
    """Read several adapters, and combine them in memory.

    Every one is put into the base model once, so that none passes with tensors missing, too many
    or of the wrong shape.

    Raises:
        UserError: If an adapter is missing or damaged, or they cannot be combined: other base
            weights, another task or other labels, something that is neither a factor nor a module
            trained whole, ranks or shapes that do not go together.
    """
    subjects = _find_subjects(config.adapters)
    first = open_adapter(config.adapters[0], base=config.base, display=display)
    members = [
        replace(first, subject=subject, adapter=adapter, record=record)
        for subject in subjects
        for adapter, record in [load_adapter(subject.adapter)]
    ]
    problems = [problem for member in members for problem in _differences(member, first)]
    adapters, parts = [], []
    for member in members:
        # What is something else is among the problems already.
        if isinstance(member.adapter, PeftAdapter):
            adapters.append(member.adapter)
            try:
                parts.append(_read_parts(member.adapter, where=str(member.subject.adapter)))
            except UserError as error:
                problems += error.problems
    if problems:
        raise UserError(problems)
    if any(_config_of(member).task != _config_of(first).task for member in members):
        display.note("the adapters read rows differently; the settings of the first are used")
    for member in members:
        member.attach()
        _detach(first.base.model)
    weights = config.weights or (1.0,) * len(members)
    layers = combine_factors([factors for factors, _ in parts], _blend(config, weights))
    saved = combine_saved([saved for _, saved in parts], weights)
    named = [
        (_name(member.subject), weight, _sha256(member.subject.adapter / WEIGHTS_FILE))
        for member, weight in zip(members, weights, strict=True)
    ]
    ranks = ", ".join(str(r) for r in sorted({factors.r for factors in layers.values()}))
    display.note(
        f"combined {len(members)} adapters with {_method_text(config)}: {len(layers)} layers of "
        f"rank {ranks}" + (f", averaged: {', '.join(adapters[0].saved_modules)}" if saved else "")
    )
    return Combined(
        opened=_as_opened(
            first, _as_adapter(adapters[0], first.base.model, layers, saved), _origin(config, named)
        ),
        inputs=[*(subject.adapter for subject in subjects), first.source.folder],
        parts=named,
    )


def write_combined(combined: Combined, output: Path) -> int:
    """Write the combination as an adapter folder, and return its size in bytes."""
    opened, record = combined.opened, combined.opened.record
    origin = {name: show(value) for name, value in record.combined.items() if name != "adapters"}
    card = model_card(
        CardData(
            name=output.resolve().name,
            base=opened.adapter.base_name or "",
            base_sha256=str(record.base["sha256"]),
            task_type=opened.adapter.task_type,
            **head_facts(opened.config.task.family, record.state),
            split="",
            rows=0,
            before={},
            after={},
            lora=origin,
            training={"lora.r": str(opened.config.lora.r)},
            versions={package: version(package) for package in PACKAGES},
            parts=[(name, f"{weight:g}", sha256) for name, weight, sha256 in combined.parts],
        )
    )
    names = [name for name, _ in opened.base.model.named_modules()]
    return save_adapter(output, opened.adapter, record, card=card, module_names=names)


def _find_subjects(paths: Sequence[str]) -> list[Subject]:
    """Find all adapters; the errors name the setting that the paths are in."""
    subjects, problems = [], []
    for path in paths:
        try:
            subjects.append(find_subject(path))
        except UserError as error:
            problems += [
                replace(p, key="adapters", message=p.message.replace("`from`", "`adapters`"))
                for p in error.problems
            ]
    if problems:
        raise UserError(problems)
    return subjects


def _read_parts(
    adapter: PeftAdapter, *, where: str
) -> tuple[dict[str, Factors], Mapping[str, Any]]:
    if adapter.target_parameters:
        raise UserError(
            Problem(
                id="merge.cannot-combine",
                message="`adapters` must adapt layers, but one adapts fused weights of experts: "
                f"{few(adapter.target_parameters)}.",
                key="adapters",
                where=where,
            )
        )
    return read_factors(adapter.state, adapter.saved_modules, adapter.settings, where=where)


def _differences(member: Opened, first: Opened) -> list[Problem]:
    """Say in what an adapter is not of the base, the task or the labels of the first one."""
    where = str(member.subject.adapter)
    rules = []
    if member.record.base.get("sha256") != first.record.base.get("sha256"):
        rules.append(
            f"be of the same base weights, but {member.record.base.get('name')} has others than "
            f"{first.record.base.get('name')}"
        )
    config = _config_of(member)
    if config.strategy.name != "lora" or not isinstance(member.adapter, PeftAdapter):
        rules.append(f"be LoRA adapters, but one was trained with strategy={config.strategy.name}")
    family, wanted = config.task.family, first.config.task.family
    if family != wanted:
        rules.append(f"be of the same task, but one is of {family} and the first of {wanted}")
    else:
        rules += _other_options(member, first)
    return [
        Problem(
            id="merge.cannot-combine",
            message=f"`adapters` must {rule}.",
            key="adapters",
            where=where,
        )
        for rule in rules
    ]


def _config_of(member: Opened) -> TrainConfig:
    """Return what an adapter was trained with, without its data, which is not its own."""
    config, problems = decode(TrainConfig, dict(member.record.config))
    if config is None:
        where = str(member.subject.adapter / RECORD)
        raise UserError([replace(problem, where=where) for problem in problems])
    trained: TrainConfig = replace(config, task=replace(config.task, data=DataConfig()))
    return trained


def _other_options(member: Opened, first: Opened) -> list[str]:
    """Say which options of the model differ, such as the labels or their order."""
    family = FAMILIES[first.config.task.family]
    wanted = family.model_options(first.record.state)
    try:
        found = family.model_options(member.record.state)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        return [f"say what their labels are, but one does not ({type(error).__name__}: {error})"]
    # The labels in order tell of their number, and of the numbers by label.
    if "id2label" in wanted:
        wanted, found = ({"labels": list(o["id2label"].values())} for o in (wanted, found))
    return [
        f"have the same {name} in the same order, but one has {_short(found.get(name))} and the "
        f"first {_short(value)}"
        for name, value in wanted.items()
        if found.get(name) != value
    ]


def _short(value: Any) -> str:
    return few([str(item) for item in value]) if isinstance(value, list) else show(value)


def _detach(model: nn.Module) -> None:
    """Take the adapters out of a model again, the innermost first; frozen layers are unchanged."""
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, AdapterLayer)]
    for name, layer in reversed(layers):
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, layer.base_layer)


def _blend(config: MergeConfig, weights: Sequence[float]) -> Blend:
    return Blend(
        weights=weights,
        method=config.method,
        density=config.density,
        majority_sign=config.majority_sign,
        r=config.r,
        seed=config.seed,
    )


def _method_text(config: MergeConfig) -> str:
    details = [f"{name} {show(value)}" for name, value in _method_settings(config).items()]
    return f"{config.method} ({', '.join(details)})" if details else config.method


def _method_settings(config: MergeConfig) -> dict[str, Any]:
    """Return the settings that the method reads."""
    method, settings = config.method, dict[str, Any]()
    if method not in ("linear", "cat", "svd"):
        settings["density"] = config.density
    if method in ("ties", "dare_ties"):
        settings["majority_sign"] = config.majority_sign
    if method in ("dare_ties", "dare_linear"):
        settings["seed"] = config.seed
    if method == "svd" and config.r is not None:
        settings["r"] = config.r
    return settings


def _origin(config: MergeConfig, parts: Sequence[tuple[str, float, str]]) -> dict[str, Any]:
    return {
        "method": config.method,
        **_method_settings(config),
        "adapters": [
            {"name": name, "weight": weight, "sha256": sha256} for name, weight, sha256 in parts
        ],
    }


def _as_adapter(
    first: PeftAdapter, model: nn.Module, layers: Mapping[str, Factors], saved: Mapping[str, Any]
) -> PeftAdapter:
    targets = tuple(dict.fromkeys(outermost(name) for name in layers))
    return PeftAdapter(
        settings=_settings(layers, dropout=first.settings.dropout),
        targets=targets,
        saved_modules=first.saved_modules,
        task_type=first.task_type,
        base_name=first.base_name,
        revision=first.revision,
        state={**factor_state(layers), **saved},
        model_class=f"{type(model).__module__}.{type(model).__name__}",
        fan_in_fan_out=any(is_conv1d(model.get_submodule(name)) for name in targets),
    )


def _as_opened(first: Opened, adapter: PeftAdapter, origin: Mapping[str, Any]) -> Opened:
    """Return the combination with the task, labels and data of the first adapter."""
    settings = adapter.settings
    lora = LoraConfig(
        r=settings.r,
        alpha=settings.alpha,
        dropout=settings.dropout,
        targets=adapter.targets,
        rank_pattern=settings.rank_pattern,
        alpha_pattern=settings.alpha_pattern,
    )
    record = AdapterRecord(
        config={**first.record.config, "lora": to_plain(lora)},
        state=first.record.state,
        base=first.record.base,
        metrics={},
        combined=origin,
    )
    return replace(
        first,
        subject=Subject(adapter=first.subject.adapter, run=None),
        config=replace(first.config, lora=lora),
        adapter=adapter,
        record=record,
    )


def _settings(layers: Mapping[str, Factors], *, dropout: float) -> LoraSettings:
    """Return settings in which every layer has the rank of its factors, and a scale of 1."""
    r = mode(factors.r for factors in layers.values())
    ranks = {outermost(name): factors.r for name, factors in layers.items() if factors.r != r}
    return LoraSettings(
        r=r,
        alpha=float(r),
        dropout=dropout,
        rank_pattern=ranks,
        alpha_pattern={name: float(rank) for name, rank in ranks.items()},
    )


def _name(subject: Subject) -> str:
    return (subject.run or subject.adapter).resolve().name


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()

"""Training that starts from an earlier adapter: it is trained on, or merged and built upon.

A merged one becomes a base model of its own: see `lora_cli.commands.merged_base`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from lora_cli.artifacts.adapter import (
    Adapter,
    AdapterRecord,
    Subject,
    find_subject,
    load_adapter,
)
from lora_cli.artifacts.peft_format import PeftAdapter
from lora_cli.commands.display import Display
from lora_cli.commands.locating import base_path
from lora_cli.commands.recorded import training_config
from lora_cli.config.adapters import LoraConfig
from lora_cli.config.commands import TrainConfig
from lora_cli.config.composed import Composed
from lora_cli.config.decode import decode
from lora_cli.config.groups import option_origins
from lora_cli.config.schema import flatten, select, show, to_plain
from lora_cli.data.types import Splits
from lora_cli.errors import Problem, UserError
from lora_cli.lora.patterns import is_inside
from lora_cli.lora.state import adapter_state, load_adapter_state
from lora_cli.lora.strategies import check_mergeable, head_modules
from lora_cli.models.heads import head_names
from lora_cli.tasks.table import FAMILIES

# Settings of training alone, which may differ in the next round.
_FREE = ("lora.dropout",)
_SHOWN = ("lora.r", "lora.alpha", "lora.targets")
# Teaches the body of a model, so that any family can go on from it with a head of its own.
_GENERAL = "masked_language_modeling"


@dataclass(frozen=True, kw_only=True, slots=True)
class Start:
    """The adapter that a run starts from.

    Attributes:
        subject: Where it is.
        adapter: Settings and tensors.
        record: What its folder says about it.
        config: The configuration that it was trained with.
        family: Task family of the run that starts.
        is_merged: Whether it becomes part of the base, rather than being trained on.
    """

    subject: Subject
    adapter: Adapter
    record: AdapterRecord
    config: TrainConfig
    family: str
    is_merged: bool

    @property
    def name(self) -> str:
        """The run or folder, for people."""
        return str(self.subject.run or self.subject.adapter)

    @property
    def same_family(self) -> bool:
        """Whether the adapter is of the task family of the run."""
        return self.config.task.family == self.family

    def same_head(self, splits: Splits) -> bool:
        """Whether the head of the adapter suits these rows: the same labels in the same order."""
        family = FAMILIES[self.family]
        return self.same_family and family.model_options(splits.state) == family.model_options(
            self.record.state
        )


def find_start(composed: Composed) -> tuple[Composed, Start | None]:
    """Read the adapter that `adapter` names, and return the configuration with its settings.

    Raises:
        UserError: If there is none, it cannot be gone on with, or the user set something that
            contradicts it; everything of that kind is listed.
    """
    config: TrainConfig = composed.config
    if config.adapter is None:
        return composed, None
    subject = _find(config.adapter)
    adapter, record = load_adapter(subject.adapter)
    start = Start(
        subject=subject,
        adapter=adapter,
        record=record,
        config=training_config(record, subject),
        family=config.task.family,
        is_merged=config.adapter_mode == "merge",
    )
    _check_task(start)
    plain = dict(composed.plain)
    if config.model.path is None:
        own = to_plain(start.config.model)
        given = {
            name.removeprefix("model."): select(composed.plain, name)
            for name in _set_by_user(composed, "model")
        }
        place = base_path(start.config, record, subject)
        plain["model"] = {**own, "path": place, **given}
    if start.is_merged:
        fix = "train on new rows without it, or train an adapter with strategy=lora first"
        check_mergeable(start.config.strategy.name, key="adapter", fix=fix)
    else:
        plain["lora"] = _settings_to_keep(composed, start)
    changed, problems = decode(TrainConfig, plain)
    if changed is None:
        raise UserError(problems)
    return replace(composed, config=changed, plain=plain), start


def _find(path: str) -> Subject:
    try:
        return find_subject(path)
    except UserError as error:
        raise UserError(
            [
                replace(p, key="adapter", message=p.message.replace("`from`", "`adapter`"))
                for p in error.problems
            ]
        ) from error


def _check_task(start: Start) -> None:
    """Refuse an adapter that learned another task; what read plain text is of use to all."""
    if not start.same_family and start.config.task.family != _GENERAL:
        raise UserError(
            Problem(
                id="adapter.other-task",
                message=f"`adapter` must be of the task family of the run ({start.family}), "
                f"but is of {start.config.task.family}.",
                key="adapter",
                allowed=", ".join(dict.fromkeys((start.family, _GENERAL))),
            )
        )


def _settings_to_keep(composed: Composed, start: Start) -> dict[str, Any]:
    """Return the section `lora` of an adapter that is trained on."""
    adapter, trained = start.adapter, start.config.lora
    if not isinstance(adapter, PeftAdapter) or trained.variant == "adalora":
        what = f"strategy={start.config.strategy.name}"
        if isinstance(adapter, PeftAdapter):
            what = "lora.variant=adalora, whose ranks were planned for its own run"
        raise UserError(
            Problem(
                id="adapter.cannot-continue",
                message=f"`adapter` must be one that can be trained on, but {start.name} was "
                f"trained with {what}.",
                key="adapter",
                fix="adapter_mode=merge adds a new adapter on top of it",
            )
        )
    kept = _as_saved(adapter, trained)
    effective, before, given = (
        flatten(to_plain(lora), "lora.") for lora in (kept, trained, composed.config.lora)
    )
    problems = []
    for name in sorted(_set_by_user(composed)):
        if name.startswith(_FREE) or given[name] in (effective[name], before[name]):
            continue
        problems.append(
            Problem(
                id="adapter.contradiction",
                message=f"`{name}` must be that of the adapter to be trained on "
                f"({show(effective[name])}), but is {show(given[name])}.",
                key=name,
                where=composed.origins.get(name),
                fix="leave it out, or set adapter_mode=merge to start a new adapter",
            )
        )
    if problems:
        raise UserError(problems)
    if "lora.dropout" in _set_by_user(composed):
        kept = replace(kept, dropout=composed.config.lora.dropout)
    plain: dict[str, Any] = to_plain(kept)
    return plain


def _as_saved(adapter: PeftAdapter, trained: LoraConfig) -> LoraConfig:
    """Return the settings of the tensors: a start from the base weight has doubled their rank."""
    settings = adapter.settings
    kept = replace(
        trained,
        r=settings.r,
        alpha=settings.alpha,
        init="kaiming",
        pissa_niter=None,
        rank_pattern=settings.rank_pattern,
        alpha_pattern=settings.alpha_pattern,
    )
    if trained.init == "eva" and isinstance(adapter.targets, tuple):
        # Layers to which EVA gave no rank have no adapter.
        return replace(kept, targets=adapter.targets, exclude=adapter.exclude)
    return kept


def _set_by_user(composed: Composed, section: str = "lora") -> set[str]:
    """Return the settings of a section that the user chose, by themselves or with its group."""
    own = {key: value for key, value in composed.user.items() if key != "defaults"}
    names = {name for name in flatten(own) if name.startswith(f"{section}.")}
    for entry in composed.user.get("defaults", ()):
        if section in entry:
            names |= set(option_origins(section, entry[section])) - {"lora.targets"}
    return names


def show_start(display: Display, start: Start, config: TrainConfig, *, same_head: bool) -> None:
    """Say what is gone on with, and whether its head is."""
    if start.is_merged:
        display.note(f"merged first: {start.name}, whose sum with its base is the new base")
    else:
        usual, taken = (flatten(to_plain(x), "lora.") for x in (LoraConfig(), config.lora))
        shown = [
            f"{name}={show(value)}"
            for name, value in taken.items()
            if name in _SHOWN or value != usual[name]
        ]
        display.note(f"continuing {start.name} with its settings: {' '.join(shown)}")
    if not start.same_family:
        display.note(f"the head starts anew, since the adapter's is of {start.config.task.family}")
    elif not same_head:
        before = ", ".join(map(str, start.record.state.get("labels", ())))
        display.note(
            f"the head starts anew, since the labels are not those of the adapter ({before})"
        )


def suit_labels(start: Start, splits: Splits, config: TrainConfig) -> TrainConfig:
    """Return the configuration with the label names of the adapter, where new rows lack some.

    Raises:
        UserError: If the labels are the same in another order, which would mix up the outputs.
    """
    old, new = start.record.state.get("labels"), splits.state.get("labels")
    if not isinstance(old, list) or not isinstance(new, list) or old == new:
        return config
    if set(old) == set(new):
        raise UserError(
            Problem(
                id="adapter.label-order",
                message="`task.data.label_names` must have the order of the adapter to start from, "
                f"but is {', '.join(new)}.",
                key="task.data.label_names",
                allowed=", ".join(old),
            )
        )
    if not set(new) < set(old) or config.task.data.label_names is not None:
        return config
    data = replace(config.task.data, label_names=tuple(old))
    return replace(config, task=replace(config.task, data=data))


def load_start(start: Start, model: nn.Module, saved: tuple[str, ...], *, same_head: bool) -> None:
    """Copy the tensors of the adapter into the adapters of `model`; a new head stays as it is.

    Raises:
        UserError: If they do not fit.
    """
    state: Mapping[str, torch.Tensor] = start.adapter.state
    if not same_head:
        heads = head_names(model)
        fresh = adapter_state(model, saved)
        state = {name: value for name, value in state.items() if not is_inside(name, heads)}
        state = {**state, **{n: value for n, value in fresh.items() if is_inside(n, heads)}}
        if not start.same_family:
            # Heads differ in what they take of the body, such as a pooler.
            body = str(getattr(model, "base_model_prefix", ""))
            state = {n: value for n, value in state.items() if n in fresh or is_inside(n, [body])}
            state = {**fresh, **state}
    load_adapter_state(model, state, saved, where=str(start.subject.adapter))


def trained_again(start: Start | None, model: nn.Module) -> tuple[str, ...]:
    """Return the modules that the adapter had whole: they are trained on, new or not."""
    if start is None:
        return ()
    if isinstance(start.adapter, PeftAdapter):
        paths = dict(model.named_modules())
        return tuple(name for name in start.adapter.saved_modules if name in paths)
    return head_modules(model, ())

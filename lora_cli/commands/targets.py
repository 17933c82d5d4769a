"""`lora-cli targets`: what of a model can be adapted, what the settings reach, and what it costs.

The model is laid out from its config.json alone, so nothing here depends on weights but the list
of their names, which tells whether a head is new.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lora_cli.artifacts.peft_tensors import to_peft_name
from lora_cli.artifacts.sizes import safetensors_bytes
from lora_cli.commands.display import Display
from lora_cli.commands.options import Options
from lora_cli.commands.starting import lora_settings
from lora_cli.config.adapters import LoraConfig
from lora_cli.config.commands import TargetsConfig
from lora_cli.config.composed import Composed
from lora_cli.errors import UserError
from lora_cli.lora.blocks import describe_blocks
from lora_cli.lora.build import adaptable_kinds
from lora_cli.lora.coverage import (
    PARAMETER,
    Cost,
    LayerGroup,
    cost_of,
    describe_plan,
    list_layers,
)
from lora_cli.lora.experts import VARIANTS as PARAMETER_VARIANTS
from lora_cli.lora.patterns import is_inside
from lora_cli.lora.planning import AdapterPlan, plan_adapter
from lora_cli.lora.settings import LoraSettings
from lora_cli.lora.tokens import input_tokens
from lora_cli.models.architecture import load_architecture, resolve_config
from lora_cli.models.families import auto_targets
from lora_cli.tasks.table import FAMILIES

# AdaLoRA plans over the steps of a run, on which sizes do not depend.
_ANY_NUMBER_OF_STEPS = 1000


def run(composed: Composed, options: Options, display: Display) -> int:
    """Show the layers, the matches and the costs; return the exit code."""
    del options
    config: TargetsConfig = composed.config
    source = resolve_config(config.model.path or "", revision=config.model.revision)
    family = FAMILIES[config.task.family]
    architecture = load_architecture(
        source, auto_class=family.auto_class, options={"num_labels": config.num_labels}
    )
    model, lora = architecture.model, config.lora
    groups, usual = list_layers(model), auto_targets(model.config.model_type)
    result = _summary(model, source.name, groups, usual)
    display.note(f"model: {source.name}, {result['class']}, {result['parameters']:,} parameters")
    if not architecture.has_head:
        display.note(f"head: {result['family']} has none for {config.task.family}, shown without")
    if usual is None and lora.targets == "auto":
        _show_layers(display, groups, lora.variant)
        display.note(
            f"targets: the usual ones of {result['family']} are not known: name some of these "
            "layers with lora.targets=[NAME,...], or take lora.targets=all-linear"
        )
        display.result(result)
        return 0
    try:
        plan = plan_adapter(
            model, lora, new_keys=architecture.new_keys, auto=usual, source=source.name
        )
    except UserError:
        # What there is helps to put it right.
        _show_layers(display, groups, lora.variant)
        raise
    reached = (*plan.targets.names, *plan.parameters)
    _show_layers(display, groups, lora.variant, reached=reached, whole=plan.saved)
    tokens = input_tokens(model, range(len(lora.trainable_tokens)))
    assumed = "" if architecture.knows_weights else " (if the weights have no such head yet)"
    for text in describe_plan(plan, tokens, note=assumed if plan.saved else ""):
        display.note(text)
    costs = _costs(model, plan, config, tokens)
    _show_costs(display, costs, lora)
    display.result(
        result
        | {
            "layers": [_as_json(group, reached) for group in groups],
            "targets": {
                pattern: {"layers": len(names), "blocks": describe_blocks(names)}
                for pattern, names in plan.targets.by_pattern.items()
            },
            "target_parameters": list(plan.parameters),
            "whole": list(plan.saved),
            "costs": [_cost_as_json(r, cost) for r, cost in costs.items()],
        }
    )
    return 0


def _summary(
    model: Any, name: str, groups: Sequence[LayerGroup], usual: Sequence[str] | None
) -> dict[str, Any]:
    """Return what can be said of a model before targets are known, for `--json`."""
    return {
        "model": name,
        "class": type(model).__name__,
        "family": model.config.model_type,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "auto": None if usual is None else list(usual),
        "layers": [_as_json(group, ()) for group in groups],
        "targets": None,
        "whole": None,
        "costs": [],
    }


def _show_layers(
    display: Display,
    groups: Sequence[LayerGroup],
    variant: str,
    *,
    reached: Sequence[str] = (),
    whole: Sequence[str] = (),
) -> None:
    chosen = frozenset(reached)
    rows = []
    for group in groups:
        adapted = str(sum(name in chosen for name in group.names))
        if all(is_inside(name, whole) for name in group.names):
            adapted = "whole"
        elif not _is_adaptable(group, variant):
            adapted = "never"
        blocks = group.blocks or "-"
        rows.append((group.name, group.kind, group.size, str(len(group.names)), blocks, adapted))
    columns = ("layer", "kind", "size", "count", "blocks", "adapted")
    display.table("layers", columns, rows)
    if any(row[-1] == "never" for row in rows):
        display.note(f"never: lora.variant={variant} has no form for layers of that kind")


def _is_adaptable(group: LayerGroup, variant: str) -> bool:
    if group.kind == PARAMETER:
        return variant in PARAMETER_VARIANTS
    return group.kind in adaptable_kinds(variant)


def _costs(
    model: Any, plan: AdapterPlan, config: TargetsConfig, tokens: Mapping[str, Sequence[int]]
) -> dict[int, Cost]:
    """Return the cost at each rank that was asked for and at the chosen one.

    A rank that a layer cannot have, such as one that does not divide into the groups of a
    convolution, is left out unless it is the chosen one.
    """
    costs = {}
    for r in sorted({config.lora.r, *config.ranks}):
        settings = lora_settings(_with_rank(config.lora, r), total_steps=_ANY_NUMBER_OF_STEPS)
        try:
            cost = cost_of(model, plan, settings, tokens=tokens)
            if settings.adalora is not None:
                # The file is of the end, when ranks have fallen to r on average.
                end = replace(settings, adalora=replace(settings.adalora, init_r=r))
                cost = replace(cost, tensors=_file_of(model, plan, end, tokens))
        except UserError:
            if r == config.lora.r:
                raise
            continue
        costs[r] = cost
    return costs


def _with_rank(config: LoraConfig, r: int) -> LoraConfig:
    """Return a configuration of another rank; a rank to start from that was set stays that."""
    start = config.adalora.init_r
    if start is not None and start < r:
        return replace(config, r=r, adalora=replace(config.adalora, init_r=r))
    return replace(config, r=r)


def _file_of(
    model: Any, plan: AdapterPlan, settings: LoraSettings, tokens: Mapping[str, Sequence[int]]
) -> Mapping[str, Any]:
    return cost_of(model, plan, settings, tokens=tokens).tensors


def file_bytes(cost: Cost) -> int:
    """Return the size of adapter_model.safetensors."""
    return safetensors_bytes({to_peft_name(name): value for name, value in cost.tensors.items()})


def _show_costs(display: Display, costs: Mapping[int, Cost], config: LoraConfig) -> None:
    rows = [
        (
            f"{r} (chosen)" if r == config.r else str(r),
            f"{cost.trained:,}",
            f"{100 * cost.share:.3f} %",
            f"{file_bytes(cost):,}",
        )
        for r, cost in costs.items()
    ]
    columns = ("r", "trained parameters", "share of the model", "adapter file, bytes")
    display.table("cost by rank", columns, rows)
    if config.variant == "adalora":
        display.note("adalora: parameters are of the start; the file is of the end, about")


def _as_json(group: LayerGroup, reached: Sequence[str]) -> dict[str, Any]:
    chosen = frozenset(reached)
    return {
        "name": group.name,
        "kind": group.kind,
        "shape": list(group.shape),
        "count": len(group.names),
        "blocks": group.blocks,
        "adapted": sum(name in chosen for name in group.names),
        "paths": list(group.names),
    }


def _cost_as_json(r: int, cost: Cost) -> dict[str, Any]:
    return {
        "r": r,
        "trained_parameters": cost.trained,
        "share": cost.share,
        "adapter_bytes": file_bytes(cost),
    }

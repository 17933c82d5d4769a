"""Putting adapters into the model of a run, and giving them their start.

EVA looks at training rows first. A resumed run does so again, since the ranks of the layers follow
from it: one forward pass over `lora.eva.rows` rows, which gives the same numbers each time.
"""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lora_cli.commands.display import Display
from lora_cli.config.adapters import LoraConfig
from lora_cli.config.commands import TrainConfig
from lora_cli.data.types import Row
from lora_cli.lora.eva import eva_factors, eva_settings, start_from_inputs
from lora_cli.lora.experts import inject_experts
from lora_cli.lora.initial import start_adapters
from lora_cli.lora.inject import inject_lora
from lora_cli.lora.planning import AdapterPlan
from lora_cli.lora.settings import AdaLoraSettings, LoraSettings
from lora_cli.lora.targets import ResolvedTargets
from lora_cli.tasks.contract import Batch, Task
from lora_cli.training.evaluation import evaluating
from lora_cli.training.order import cut_by_length, total_steps
from lora_cli.training.runtime import default_device, move_to


def put_in_adapters(
    model: nn.Module,
    plan: AdapterPlan,
    *,
    task: Task,
    rows: Sequence[Row],
    config: TrainConfig,
    display: Display,
) -> tuple[LoraSettings, AdapterPlan]:
    """Put adapters around the layers of a model and start them as `lora.init` says, in place.

    Args:
        model: The base model, on the CPU.
        plan: What to adapt.
        task: Runs the model on rows.
        rows: Training rows.
        config: The seed and everything about the adapters.
        display: Told how EVA spread the ranks.

    Returns:
        The settings of the adapters, and the plan with the layers that have one: EVA changes
        both.

    Raises:
        UserError: If layers cannot be adapted so, or cannot take such a start.
    """
    settings = lora_settings(config.lora, total_steps=total_steps(config.trainer, len(rows)))
    factors: dict[str, torch.Tensor] = {}
    if settings.init == "eva":
        settings, targets, factors = look_at_inputs(
            model, plan.targets, settings, task=task, rows=rows, config=config, display=display
        )
        plan = replace(plan, targets=targets)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        inject_lora(model, plan.targets.names, settings)
        inject_experts(model, plan.parameters, settings)
        start_adapters(model, settings)
    start_from_inputs(model, factors)
    return settings, plan


def sample_batches(task: Task, rows: Sequence[Row], config: TrainConfig) -> list[Batch]:
    """Draw `lora.eva.rows` rows by the seed, encode them, and put those of like length together."""
    count = min(config.lora.eva.rows, len(rows))
    features = [task.encode(row) for row in random.Random(config.seed).sample(rows, count)]
    lengths = [row["length"] for row in features]
    batches = cut_by_length(features, lengths, size=config.trainer.eval_batch_size)
    return [task.collate(batch) for batch in batches]


def look_at_inputs(
    model: nn.Module,
    targets: ResolvedTargets,
    settings: LoraSettings,
    *,
    task: Task,
    rows: Sequence[Row],
    config: TrainConfig,
    display: Display,
) -> tuple[LoraSettings, ResolvedTargets, dict[str, torch.Tensor]]:
    """Spread the ranks over the layers by what the base model gives them, and say how.

    Returns:
        The settings with a rank for each layer, the layers that got one, and the start of A by
        path.

    Raises:
        UserError: As `lora_cli.lora.eva.eva_factors`.
    """
    device = default_device()
    batches = sample_batches(task, rows, config)
    runnable: Any = model.to(device)
    try:
        with evaluating(model):
            factors = eva_factors(
                model,
                targets.names,
                settings,
                batches=display.track("look at inputs", batches),
                forward=lambda batch: task.forward(
                    runnable, {**move_to(batch, device), "generate": False}
                ),
                rho=config.lora.eva.rho,
            )
    finally:
        # The adapters are drawn on the CPU, so that every device starts from the same numbers.
        model.to("cpu")
    display.note(_spread_note(targets.names, factors, settings, rows=sum(map(_size, batches))))
    kept = {
        pattern: tuple(name for name in names if name in factors)
        for pattern, names in targets.by_pattern.items()
    }
    left = replace(targets, names=tuple(factors), by_pattern=kept)
    return eva_settings(settings, factors), left, factors


def _size(batch: Batch) -> int:
    return len(batch["ids"])


def _spread_note(
    names: Sequence[str],
    factors: Mapping[str, torch.Tensor],
    settings: LoraSettings,
    *,
    rows: int,
) -> str:
    ranks = sorted(len(A) for A in factors.values())
    budget = sum(settings.r_of(name) for name in names)
    spread = f"{ranks[0]} to {ranks[-1]}" if ranks[0] < ranks[-1] else f"{ranks[0]} each"
    without = [name for name in names if name not in factors]
    none = f", none for {', '.join(without)}" if without else ""
    return (
        f"eva: {budget:,} ranks spread over {len(names)} layers by {rows:,} training rows: "
        f"{spread}{none}"
    )


def lora_settings(config: LoraConfig, *, total_steps: int) -> LoraSettings:
    """Return the settings of the adapter that a configuration asks for.

    Args:
        config: Everything about the adapter.
        total_steps: Optimizer steps of the run, over which AdaLoRA plans.
    """
    return LoraSettings(
        r=config.r,
        alpha=config.alpha,
        dropout=config.dropout,
        variant=config.variant,
        rslora=config.rslora,
        init=config.init,
        pissa_niter=config.pissa_niter,
        lora_bias=config.lora_bias,
        bias=config.bias,
        rank_pattern=config.rank_pattern,
        alpha_pattern=config.alpha_pattern,
        d_initial=config.vera.d_initial,
        projection_seed=config.vera.seed,
        adalora=_adalora(config, total_steps) if config.variant == "adalora" else None,
    )


def planned_over(settings: LoraSettings, config: TrainConfig, *, rows: int) -> LoraSettings:
    """Return the settings for a run over so many rows as there are, now that they are encoded."""
    if settings.adalora is None:
        return settings
    steps = total_steps(config.trainer, rows)
    return replace(settings, adalora=_adalora(config.lora, steps))


def _adalora(config: LoraConfig, total_steps: int) -> AdaLoraSettings:
    plan = config.adalora
    return AdaLoraSettings(
        init_r=math.ceil(1.5 * config.r) if plan.init_r is None else plan.init_r,
        total_steps=total_steps,
        warmup_steps=int(plan.warmup_ratio * total_steps),
        final_steps=int(plan.final_ratio * total_steps),
        every=plan.every,
        beta1=plan.beta1,
        beta2=plan.beta2,
        orthogonal=plan.orthogonal,
    )

"""A small task, model and trainer for the tests of the loop."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_cli.config.optim import AdamWConfig, LinearConfig, OptimizerConfig
from lora_cli.config.sections import TrainerConfig
from lora_cli.config.tasks import DataConfig, TextClassificationConfig
from lora_cli.lora.inject import freeze_base, inject_lora, saved_modules
from lora_cli.lora.method import build_method
from lora_cli.lora.settings import LoraSettings
from lora_cli.lora.targets import resolve_targets
from lora_cli.models.base import load_base, load_tokenizer
from lora_cli.models.sources import resolve_model
from lora_cli.tasks.contract import Task
from lora_cli.tasks.table import FAMILIES
from lora_cli.training.events import Listener
from lora_cli.training.loop import Trainer
from lora_cli.training.plan import Plan
from lora_cli.training.runtime import Runtime


def build_task(model_dir: Path, data: Path) -> tuple[Task, Any, dict[str, list[Any]]]:
    """Return the task, the base model and the encoded rows of each split."""
    family = FAMILIES["text_classification"]
    config = TextClassificationConfig(data=DataConfig(path=str(data)), max_length=32)
    splits = family.load(config, seed=0)
    source = resolve_model(str(model_dir), revision=None)
    base = load_base(
        source,
        auto_class=family.auto_class,
        options=family.model_options(splits.state),
        dtype="auto",
        seed=0,
    )
    task = family.build(config, splits.state, load_tokenizer(source))
    rows = {name: [task.encode(row) for row in rows] for name, rows in splits.rows.items()}
    return task, base, rows


def build_trainer(
    model_dir: Path,
    data: Path,
    *,
    listeners: Sequence[Listener] = (),
    dropout: float = 0.0,
    model_dropout: bool = True,
    targets: Any = ("query", "value"),
    lora: LoraSettings | None = None,
    optimizer: OptimizerConfig | None = None,
    **settings: Any,
) -> Trainer:
    """Return a trainer over the toy reviews; `settings` are fields of `TrainerConfig`."""
    lora = lora or LoraSettings(r=4, alpha=8.0, dropout=dropout)
    task, base, rows = build_task(model_dir, data)
    saved = saved_modules(base.model, base.new_keys, ())
    targets = resolve_targets(
        base.model,
        targets=targets,
        exclude=(),
        auto=None,
        saved_modules=saved,
    )
    torch.manual_seed(0)
    inject_lora(base.model, targets.names, lora)
    freeze_base(base.model, saved)
    if not model_dropout:
        for module in base.model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    trainer = replace(TrainerConfig(epochs=2, global_batch_size=8, log_steps=1), **settings)
    return Trainer(
        task=task,
        model=base.model,
        saved_modules=saved,
        plan=Plan(
            train=rows["train"],
            validation=rows["validation"],
            trainer=trainer,
            optimizer=optimizer or AdamWConfig(lr=5e-3),
            scheduler=LinearConfig(),
            seed=7,
        ),
        runtime=Runtime(precision=trainer.precision),
        method=build_method(base.model, lora),
        listeners=listeners,
    )

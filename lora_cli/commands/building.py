"""From a prepared run to what the trainer and the records are told of it."""

from pathlib import Path
from typing import Any

from lora_cli.commands.merged_base import merged_record
from lora_cli.commands.preparing import Prepared
from lora_cli.commands.saving import unnamed
from lora_cli.config.commands import TrainConfig
from lora_cli.training.plan import Plan


def build_plan(prepared: Prepared, config: TrainConfig, *, is_second: bool) -> Plan:
    """Return what to train on and how.

    Args:
        prepared: The rows, and the modules that are trained whole.
        config: Of this phase.
        is_second: Whether a phase went before, of which the order of rows must differ.
    """
    return Plan(
        train=prepared.train,
        validation=prepared.validation,
        trainer=config.trainer,
        optimizer=config.optimizer,
        scheduler=config.scheduler,
        seed=config.seed + is_second,
        may_be_unused=unnamed(prepared.saved, config.lora.modules_to_save),
    )


def base_record(prepared: Prepared, path: Path) -> dict[str, Any]:
    """Return what the records of the run directory `path` say of the base model."""
    source, start = prepared.source, prepared.start
    if start is not None and start.is_merged:
        return merged_record(start, source, path)
    return {"name": source.name, "revision": source.revision, "sha256": source.sha256}

"""What a run has trained, as files: the adapter in its form, its record, the predictions."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml

from lora_cli.artifacts.adapter import Adapter, AdapterRecord, save_adapter
from lora_cli.artifacts.card import model_card
from lora_cli.artifacts.peft_format import PeftAdapter
from lora_cli.artifacts.report import write_report
from lora_cli.artifacts.run_dir import describe_environment, write_description, write_json
from lora_cli.artifacts.tuned import Tuned
from lora_cli.commands.data_report import report_tables
from lora_cli.commands.preparing import Prepared
from lora_cli.commands.reporting import card_data, report_data
from lora_cli.config.commands import TrainConfig
from lora_cli.config.composed import Composed, recipe_text
from lora_cli.config.redaction import HIDDEN, redact, redact_idle
from lora_cli.lora.merge import merge_lora
from lora_cli.lora.patterns import matches
from lora_cli.lora.portable import from_portable, to_portable
from lora_cli.lora.strategies import round_to
from lora_cli.tasks.contract import Task
from lora_cli.tasks.table import FAMILIES
from lora_cli.training.evaluation import Evaluation
from lora_cli.training.selection import tensors_sha256


def trained_adapter(
    prepared: Prepared,
    config: TrainConfig,
    tensors: Mapping[str, torch.Tensor],
    *,
    base: Mapping[str, Any],
) -> Adapter:
    """Return trained tensors in the form that files hold.

    Args:
        prepared: The model that they are of.
        config: What was trained.
        tensors: By the names of `adapter_state`.
        base: What the record says of the base model.
    """
    task_type = FAMILIES[config.task.family].task_type
    base_name, revision = config.model.hub_id or config.model.path or "", config.model.revision
    if "folder" in base:
        base_name, revision = base["name"], None
    if prepared.applied is not None:
        return Tuned(
            state=dict(tensors),
            saved_modules=prepared.saved,
            task_type=task_type,
            base_name=base_name,
            revision=revision,
            prefix=prepared.applied.prefix,
        )
    state, settings = to_portable(tensors, prepared.settings)
    return PeftAdapter(
        settings=settings,
        targets=prepared.targets.names,
        saved_modules=prepared.saved,
        task_type=task_type,
        base_name=base_name,
        revision=revision,
        state=state,
        target_parameters=prepared.parameters,
        tokens=prepared.tokens,
    )


def save_trained(
    path: Path,
    prepared: Prepared,
    config: TrainConfig,
    tensors: Mapping[str, torch.Tensor],
    *,
    plain: Mapping[str, Any],
    base: Mapping[str, Any],
    metrics: Mapping[str, Any],
    sha256: str = "",
) -> int:
    """Write the adapter of a run directory, and return its size in bytes.

    Args:
        path: The run directory.
        prepared: The model that the tensors are of.
        config: What was trained.
        tensors: By the names of `adapter_state`.
        plain: The resolved configuration, for the record.
        base: What the record says of the base model.
        metrics: On the validation rows: "base" and "adapter".
        sha256: What `tensors_sha256` said of the tensors as they were trained; empty computes it.
    """
    adapter = trained_adapter(prepared, config, tensors, base=base)
    rows = len(prepared.validation)
    record = AdapterRecord(
        config=portable_config(plain),
        state=prepared.splits.state,
        base=base,
        metrics={"split": "validation", "rows": rows, **metrics},
        tensors_sha256=sha256 or tensors_sha256(tensors),
    )
    card = model_card(card_data(config, record, adapter, name=path.resolve().name))
    names = prepared.module_names
    return save_adapter(path / "adapter", adapter, record, card=card, module_names=names)


def live_state(prepared: Prepared, adapter: Adapter) -> dict[str, torch.Tensor]:
    """Return what `trained_adapter` was given, from what it returned."""
    if prepared.applied is not None:
        return dict(adapter.state)
    return from_portable(adapter.state, prepared.settings)


def merge_trained(prepared: Prepared) -> None:
    """Make what was trained part of the base weights, in place; see `why_unmergeable`."""
    if prepared.applied is None:
        merge_lora(prepared.model)
    else:
        round_to(prepared.model, prepared.dtypes)


def save_description(
    path: Path, composed: Composed, *, device: str, base: Mapping[str, Any], run: str
) -> None:
    """Write recipe, configuration and environment into a run directory, without secrets.

    Args:
        path: The run directory.
        composed: What is run.
        device: Where it runs.
        base: What the record says of the base model.
        run: Id of the run.
    """
    environment = describe_environment(seed=composed.config.seed, device=device, base=base)
    environment["arguments"] = redact(environment["arguments"])
    plain, user = redact_idle(composed.plain), redact_idle(composed.user)
    hidden = "" if user == composed.user else f"# {HIDDEN} stands for what looked like a secret.\n"
    write_description(
        path,
        recipe=hidden + recipe_text(replace(composed, user=user)),
        config=yaml.safe_dump(plain, sort_keys=False, allow_unicode=True),
        environment={**environment, "run_id": run},
    )


def unnamed(saved: Iterable[str], patterns: Iterable[str]) -> tuple[str, ...]:
    """Return the modules that are trained whole without anybody having asked for it."""
    named = tuple(patterns)
    return tuple(name for name in saved if not any(matches(p, name) for p in named))


def portable_config(plain: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration without places on this machine and secrets: adapters are shared."""
    copy: dict[str, Any] = json.loads(json.dumps(redact_idle(plain)))
    copy["run"] = {"dir": None, "name": None}
    # The adapter that a run started from is in its result already.
    copy["adapter"] = None
    data = copy["task"]["data"]
    if data["path"] is not None and Path(data["path"]).is_absolute():
        data["path"] = None
    return copy


def write_findings(
    path: Path,
    prepared: Prepared,
    config: TrainConfig,
    result: Mapping[str, Any],
    evaluation: Evaluation,
) -> None:
    """Write predictions and report into a run directory.

    Args:
        path: The run directory.
        prepared: What was trained on.
        config: What was trained.
        result: The content of result.json.
        evaluation: Of the adapter, on the validation rows.
    """
    _write_predictions(path / "predictions" / "validation.jsonl", prepared.task, evaluation)
    details, notes = prepared.task.report(evaluation.predictions), prepared.splits.notes
    rows = len(evaluation.predictions)
    data = report_data(
        path,
        config,
        result=result,
        details=details,
        rows=rows,
        notes=notes,
        data=report_tables(prepared.report),
    )
    write_json(path / "data_report.json", prepared.report)
    write_report(path / "report.html", data)


def _write_predictions(path: Path, task: Task, evaluation: Evaluation) -> None:
    path.parent.mkdir(exist_ok=True)
    lines = [json.dumps(task.to_json(p), ensure_ascii=False) for p in evaluation.predictions]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")

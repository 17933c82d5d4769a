"""The end of a run: the merged model beside the adapter, and what result.json says."""

import resource
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_cli.commands.data_report import show_without, without_repeated
from lora_cli.commands.display import Display
from lora_cli.commands.phases import FirstPhase, give_back_weights
from lora_cli.commands.preparing import Prepared
from lora_cli.commands.reporting import ORDER, show_comparison
from lora_cli.commands.saving import merge_trained
from lora_cli.commands.sharing import merge_shares
from lora_cli.config.commands import TrainConfig
from lora_cli.lora.strategies import why_unmergeable
from lora_cli.training.evaluation import Evaluation
from lora_cli.training.events import RunEnded
from lora_cli.training.loop import Trainer
from lora_cli.training.sharding import is_sharded


def evaluate_merged(
    trainer: Trainer, prepared: Prepared, config: TrainConfig, display: Display
) -> Mapping[str, float] | None:
    """Merge and evaluate; None where that cannot be done, which is told."""
    if why := why_unmergeable(config.strategy.name):
        display.note(f"not merged: {why}")
        return None
    give_back_weights(prepared, config, display)
    if is_sharded(prepared.model):
        merge_shares(prepared)
    else:
        merge_trained(prepared)
    return trainer.evaluate().metrics(prepared.task)


def compared_forms(
    prepared: Prepared,
    first: FirstPhase | None,
    *,
    base: Mapping[str, float],
    start: Mapping[str, float],
    adapter: Mapping[str, float],
    merged: Mapping[str, float] | None,
) -> dict[str, Any]:
    """Return the metrics of the forms of the model that are compared, in order.

    Args:
        prepared: What was trained.
        first: How the first of two phases ended, if there were two.
        base: Metrics of the base model.
        start: Metrics of the adapter that the run started from, if any.
        adapter: Metrics of what was trained.
        merged: Metrics of the merged model, if there can be one.
    """
    columns: dict[str, Any] = {"base": dict(base)}
    if prepared.start is not None and not prepared.start.is_merged:
        columns["start"] = dict(start)
    if first is not None:
        columns["lora"] = dict(first.metrics)
    return {**columns, "adapter": dict(adapter), "merged": merged}


def describe_result(
    trainer: Trainer,
    ended: RunEnded,
    columns: Mapping[str, Any],
    prepared: Prepared,
    evaluation: Evaluation,
) -> dict[str, Any]:
    """Return what result.json says of every finished run.

    Args:
        trainer: As it has ended.
        ended: How.
        columns: Metrics of the forms of the model; see `compared_forms`.
        prepared: What was trained on.
        evaluation: Of the adapter, on the validation rows.
    """
    metric = prepared.task.metric
    repeated = prepared.splits.repeated.get("validation", frozenset())
    without = without_repeated(prepared.task, evaluation, repeated)
    return {
        "exit_code": 0,
        "reason": ended.reason,
        "metric": {"name": metric, "value": columns["adapter"][metric], "split": "validation"},
        **columns,
        "steps": ended.step,
        "seconds": ended.seconds,
        "samples_per_second": ended.samples_per_second,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "trainable_parameters": sum(p.numel() for p in trainer.parameters.values()),
        **trainer.sizes.halved(),
        **({} if without is None else {"without_repeated": without}),
    }


def show_result(display: Display, path: Path, result: Mapping[str, Any], *, rows: int) -> None:
    """Show how a run has ended, given the content of its result.json.

    Args:
        display: Where to.
        path: The run directory.
        result: The content.
        rows: Number of rows that the metrics are about.
    """
    columns = {form: result[form] for form in ORDER if form in result}
    show_comparison(display, "validation", rows, columns)
    if without := result.get("without_repeated"):
        show_without(display, without)
    display.note(f"best checkpoint: step {result['best_step']} of {result['steps']}")
    display.note(f"run directory: {path}")
    display.result({"run": str(path), **result})


def first_metrics(lines: Sequence[Mapping[str, Any]], event: str) -> Mapping[str, float]:
    """Return the metrics of the first line of a metrics file that tells of an event."""
    found: Mapping[str, float] = next((x["metrics"] for x in lines if x["event"] == event), {})
    return found

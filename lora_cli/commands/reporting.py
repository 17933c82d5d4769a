"""Numbers for people: comparison tables, scores by class, what model card and report hold."""

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lora_cli.artifacts.adapter import Adapter, AdapterRecord
from lora_cli.artifacts.card import CardData
from lora_cli.artifacts.report import COUNTED, DataTable, ReportData
from lora_cli.artifacts.run_dir import PACKAGES, read_metrics
from lora_cli.artifacts.tuned import Tuned
from lora_cli.commands.display import Display
from lora_cli.config.commands import TrainConfig
from lora_cli.config.schema import flatten, show, to_plain
from lora_cli.lora.strategies import WITH_LORA
from lora_cli.tasks.single_label import SingleLabelFamily
from lora_cli.tasks.table import FAMILIES

# "start" is the adapter that a run starts from, "lora" the first phase of a run of two.
ORDER = ("base", "start", "lora", "adapter", "merged", "exported")
# What an adapter folder holds, by strategy, for the model card.
KINDS = {
    "lora": "A LoRA adapter",
    "full": "All weights, tuned,",
    "lora_then_full": "All weights, tuned after a LoRA adapter was merged,",
    "head": "A head",
    "top": "The last blocks and the head, tuned,",
    "bitfit": "Tuned biases and a head",
    "adapter": "Bottleneck adapters and a head",
    "prefix": "A tuned prefix and a head",
}

# More do not fit beside each other on a terminal.
_MOST_COLUMNS = 6


def show_comparison(
    display: Display,
    split: str,
    rows: int,
    metrics: Mapping[str, Mapping[str, float] | None],
    *,
    sizes: Mapping[str, int] | None = None,
) -> None:
    """Show one row for each form of the model, one column for each metric, or, of many, a row.

    A form without metrics is one that there cannot be: a merged model of what cannot be merged.
    """
    models = {name: metrics[name] or {} for name in ORDER if name in metrics}
    names = list(dict.fromkeys(name for found in models.values() for name in found))
    columns = ["model", *names, *(["size on disk"] if sizes else [])]
    table = []
    for model, found in models.items():
        cells = [f"{found[name]:.4f}" if name in found else "" for name in names]
        size = f"{sizes[model] / 1e6:.1f} MB" if sizes and model in sizes else ""
        label = model if found else f"{model}: cannot be"
        table.append([label, *cells, *([size] if sizes else [])])
    if len(names) > _MOST_COLUMNS:
        columns, *table = (list(line) for line in zip(columns, *table, strict=True))
        columns[0] = "metric"
    display.table(f"{split} ({rows:,} rows)", columns, table)


def show_report(display: Display, report: Mapping[str, Any]) -> None:
    """Show the scores of each class, and their averages, where a task has them."""
    if "classes" not in report:
        return
    lines = list(zip(report["labels"], report["classes"], strict=True))
    lines += [("macro average", report["macro"]), ("weighted average", report["weighted"])]
    scores = [name for name in report["macro"] if name != "support"]
    table = [
        [name, *(f"{line[score]:.4f}" for score in scores), f"{line['support']:,}"]
        for name, line in lines
    ]
    counted = next((COUNTED[name] for name in scores if name in COUNTED), "rows")
    display.table("adapter, by class", ["class", *scores, counted], table)


def card_data(
    config: TrainConfig, record: AdapterRecord, adapter: Adapter, *, name: str
) -> CardData:
    """Gather what the model card says."""
    kind, is_peft, is_ignored = KINDS["lora"], True, False
    if isinstance(adapter, Tuned):
        kind, is_peft = KINDS[config.strategy.name], adapter.loads_in_peft
        is_ignored = adapter.prefix is not None and not is_peft
    return CardData(
        name=name,
        base=adapter.base_name or "",
        base_sha256=str(record.base["sha256"]),
        task_type=adapter.task_type,
        **head_facts(config.task.family, record.state),
        split=str(record.metrics["split"]),
        rows=int(record.metrics["rows"]),
        before=record.metrics["base"],
        after=record.metrics["adapter"],
        lora=_method_settings(config),
        training=_training_settings(config),
        kind=kind,
        loads_in_peft=is_peft,
        ignored_by_peft=is_ignored,
        versions={package: version(package) for package in PACKAGES},
    )


def head_facts(family: str, state: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a model card says of the head of a task, given the state of that."""
    return {
        "auto_class": FAMILIES[family].auto_class,
        "labels": tuple(state.get("labels", ())),
        "num_labels": FAMILIES[family].model_options(state).get("num_labels"),
        "has_one_label": isinstance(FAMILIES[family], SingleLabelFamily),
        "processor": FAMILIES[family].processor,
    }


def report_data(
    path: Path,
    config: TrainConfig,
    *,
    result: Mapping[str, Any],
    details: Mapping[str, Any],
    rows: int,
    notes: Sequence[str],
    data: Sequence[DataTable],
) -> ReportData:
    """Gather what report.html shows, curves from the run's metrics.jsonl."""
    lines = read_metrics(path / "metrics.jsonl")
    train = [line for line in lines if line["event"] == "train"]
    evaluations = [line for line in lines if line["event"] == "eval"]
    name = result["metric"]["name"]
    return ReportData(
        name=path.resolve().name,
        settings={
            "model": config.model.hub_id or config.model.path or "",
            "data": config.task.data.path or "",
            **_method_settings(config),
            **_training_settings(config),
            "trained parameters": f"{result['trainable_parameters']:,}",
            "adapter size": f"{result['adapter_bytes'] / 1e6:.2f} MB",
            "time": f"{result['seconds']:.0f} s, {result['samples_per_second']:.0f} samples/s",
        },
        split="validation",
        rows=rows,
        metrics={form: result[form] for form in ORDER if result.get(form)},
        losses=[(line["step"], line["loss"]) for line in train],
        learning_rates=[(line["step"], line["lr"]) for line in train],
        metric=name,
        evaluations=[(line["step"], line["metrics"][name]) for line in evaluations],
        labels=details.get("labels", ()),
        confusion=details.get("confusion", ()),
        classes=details.get("classes", ()),
        averages={name: details[name] for name in ("macro", "weighted") if name in details},
        notes=notes,
        data=data,
        pictures=details.get("pictures", ()),
    )


def _method_settings(config: TrainConfig) -> dict[str, str]:
    """Return the settings of what is trained, by name."""
    strategy = flatten(to_plain(config.strategy), "strategy.")
    shown = {"strategy": str(strategy.pop("strategy.name"))}
    shown |= {name: show(value) for name, value in strategy.items()}
    if config.strategy.name == "lora":
        return _lora_settings(config)
    return shown | (_lora_settings(config) if config.strategy.name in WITH_LORA else {})


def _lora_settings(config: TrainConfig) -> dict[str, str]:
    targets = config.lora.targets
    return {
        "lora.r": str(config.lora.r),
        "lora.alpha": f"{config.lora.alpha:g}",
        "lora.dropout": f"{config.lora.dropout:g}",
        "lora.targets": targets if isinstance(targets, str) else ", ".join(targets),
    }


def _training_settings(config: TrainConfig) -> dict[str, str]:
    trainer = config.trainer
    length = f"{trainer.max_steps} steps" if trainer.max_steps else f"{trainer.epochs} epochs"
    return {
        "length": length,
        "trainer.global_batch_size": str(trainer.global_batch_size),
        "optimizer": f"{config.optimizer.name}, lr {config.optimizer.lr:g}",
        "scheduler": config.scheduler.name,
        "seed": str(config.seed),
    }

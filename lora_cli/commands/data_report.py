"""What the rows of a run are like: counted before training, shown, and kept beside the results."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lora_cli.artifacts.report import DataTable
from lora_cli.commands.display import Display
from lora_cli.data.types import Splits
from lora_cli.errors import Problem, UserError
from lora_cli.tasks.contract import Family, Features, Task
from lora_cli.training.evaluation import Evaluation

# Labels that are shown on the terminal; the report has all.
_SHOWN_LABELS = 12
_PARTS = ("least", "mean", "p95", "most")


def describe_rows(
    family: Family, splits: Splits, features: Mapping[str, Sequence[Features]]
) -> dict[str, Any]:
    """Count what encoded rows hold.

    Args:
        family: Of the task.
        splits: The rows, as read.
        features: The encoded rows by split, each in the order of the rows.

    Returns:
        By split: ``rows``; ``tokens`` (mean, median, the 95th of 100, the most of a row);
        ``cut_rows`` and ``cut_tokens`` (shares that `task.max_length` left out); ``supervised``,
        what a row has to learn from, on average; ``repeated``, rows that train has as well; and
        ``labels``, how often each is there, where a task has labels. Rows that are no texts have
        no tokens: in place of these are ``measures``, sizes by name (the least, mean, median, the
        95th of 100, the most), and ``kinds``, how often each value of other properties is there.

    Raises:
        UserError: If no row of train has anything to learn from.
    """
    report = {}
    for split, rows in features.items():
        supervised = sum(row["supervised"] for row in rows)
        if split == "train" and not supervised:
            raise UserError(_nothing_supervised(len(rows)))
        report[split] = {
            "rows": len(rows),
            **(_count_media(rows) if "measures" in rows[0] else _count_tokens(rows)),
            "supervised": supervised / len(rows),
            "repeated": len(splits.repeated.get(split, ())),
            "labels": family.count_labels(splits.rows[split], splits.state),
        }
    return report


def _count_tokens(rows: Sequence[Features]) -> dict[str, Any]:
    lengths = np.array([row["length"] for row in rows])
    cut = np.array([row["cut"] for row in rows])
    return {
        "tokens": {
            "mean": float(lengths.mean()),
            "median": float(np.quantile(lengths, 0.5)),
            "p95": float(np.quantile(lengths, 0.95)),
            "most": int(lengths.max()),
        },
        "cut_rows": float((cut > 0).mean()),
        "cut_tokens": float(cut.sum() / (lengths.sum() + cut.sum())),
    }


def _count_media(rows: Sequence[Features]) -> dict[str, Any]:
    measures, kinds = {}, {}
    for name in rows[0]["measures"]:
        sizes = np.array([row["measures"][name] for row in rows], np.float64)
        measures[name] = {
            "least": float(sizes.min()),
            "mean": float(sizes.mean()),
            "median": float(np.quantile(sizes, 0.5)),
            "p95": float(np.quantile(sizes, 0.95)),
            "most": float(sizes.max()),
        }
    for name in rows[0]["kinds"]:
        kinds[name] = dict(Counter(row["kinds"][name] for row in rows).most_common())
    return {"measures": measures, "kinds": kinds}


def show_rows(display: Display, report: Mapping[str, Any]) -> None:
    """Show the counts of `describe_rows` as tables, with the most frequent labels alone."""
    for title, columns, rows in report_tables(report):
        shown = rows if columns[0] == "split" else rows[:_SHOWN_LABELS]
        more = f": the first {len(shown)} of {len(rows)}" if len(shown) < len(rows) else ""
        display.table(title + more, columns, shown, is_result=False)


def report_tables(report: Mapping[str, Any]) -> list[DataTable]:
    """Return the counts of `describe_rows` as tables of text: splits, and labels if there are."""
    tables = _media_tables(report) if "measures" in report["train"] else [_token_table(report)]
    by_label: Mapping[str, int] = report["train"]["labels"]
    names = sorted(by_label, key=lambda name: -by_label[name])
    if names:
        tables.append(("Labels in the data", ["label", *report], _label_rows(report, names)))
    return tables


def _token_table(report: Mapping[str, Any]) -> DataTable:
    columns = ["split", "rows", "tokens", "95 %", "most", "rows cut", "tokens cut", "supervised"]
    table = [
        [
            split,
            f"{counts['rows']:,}",
            f"{counts['tokens']['mean']:.1f}",
            f"{counts['tokens']['p95']:.0f}",
            f"{counts['tokens']['most']:,}",
            f"{100 * counts['cut_rows']:.1f} %",
            f"{100 * counts['cut_tokens']:.1f} %",
            f"{counts['supervised']:.1f}",
        ]
        for split, counts in report.items()
    ]
    return "Data", columns, table


def _media_tables(report: Mapping[str, Any]) -> list[DataTable]:
    """Return a table of sizes, and one of how often each value of other properties is there."""
    sizes, kinds = [], []
    for split, counts in report.items():
        rows = f"{counts['rows']:,}"
        for name, found in counts["measures"].items():
            sizes.append([split, rows, name, *(f"{found[part]:,.5g}" for part in _PARTS)])
        for name, values in counts["kinds"].items():
            text = ", ".join(f"{value} ({number:,})" for value, number in values.items())
            kinds.append([split, name, text])
    return [
        ("Data", ["split", "rows", "size", "least", "mean", "95 %", "most"], sizes),
        ("Kinds of files", ["split", "kind", "files"], kinds),
    ]


def _label_rows(report: Mapping[str, Any], names: Sequence[str]) -> list[list[str]]:
    """Return a row for each label, with its number and share in each split."""
    totals = {split: sum(counts["labels"].values()) or 1 for split, counts in report.items()}
    return [
        [name]
        + [
            f"{counts['labels'].get(name, 0):,} "
            f"({100 * counts['labels'].get(name, 0) / totals[split]:.1f} %)"
            for split, counts in report.items()
        ]
        for name in names
    ]


def without_repeated(
    task: Task, evaluation: Evaluation, repeated: frozenset[str]
) -> dict[str, Any] | None:
    """Return metrics on rows that train does not have, and their number; None if all or none are.

    Args:
        task: Computes the metrics.
        evaluation: Of all rows.
        repeated: Ids of the rows that train has as well.
    """
    new = [prediction for prediction in evaluation.predictions if prediction.id not in repeated]
    if not new or len(new) == len(evaluation.predictions):
        return None
    return {"rows": len(new), **task.metrics(new)}


def show_without(display: Display, found: Mapping[str, Any]) -> None:
    """Show what `without_repeated` found."""
    numbers = "  ".join(f"{name} {value:.4f}" for name, value in found.items() if name != "rows")
    display.note(f"adapter on the {found['rows']:,} rows that train has not: {numbers}")


def _nothing_supervised(rows: int) -> Problem:
    return Problem(
        id="data.nothing-supervised",
        message=f"`train` must have something to learn from, but none of its {rows:,} encoded rows "
        "has.",
        key="task.max_length",
        fix="raise task.max_length, which cuts rows before what is to be learned",
    )

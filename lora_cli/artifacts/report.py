"""One self-contained report.html: no scripts, nothing fetched, everything from outside escaped."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from lora_cli.artifacts.commit import replace_file
from lora_cli.artifacts.svg import Points, line_chart

_NARROW_MATRIX = 6
_LARGEST_MATRIX = 30
_MOST_CONFUSED = 25

# A colour is written once for light and once for dark; the page follows the reader's setting.
_CSS = """
:root { color-scheme: light dark; --ink: #1d232b; --soft: #5d6875; --page: #fbfbfa;
  --card: #fff; --edge: #dfe3e8; --accent: 31 98 189; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ed; --soft: #9aa5b1; --page: #14171b;
  --card: #1c2026; --edge: #333a43; --accent: 108 168 255; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 1.5rem 1rem 3rem; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.05rem; margin: 0 0 .75rem; }
p { margin: 0 0 .75rem; } .soft, .empty { color: var(--soft); }
section { background: var(--card); border: 1px solid var(--edge); border-radius: 8px;
  padding: 1rem; margin-top: 1rem; min-width: 0; }
.pair { display: grid; gap: 0 1rem; grid-template-columns: repeat(auto-fit, minmax(17rem, 1fr)); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; text-align: right; border-bottom: 1px solid var(--edge);
  white-space: nowrap; }
thead th { color: var(--soft); font-weight: 500; }
tbody th, thead th:first-child { text-align: left; font-weight: 500; }
tbody tr:last-child > * { border-bottom: 0; }
.settings { width: 100%; }
.settings th { color: var(--soft); }
.settings td { text-align: left; white-space: normal; overflow-wrap: anywhere; width: 80%; }
.matrix td { text-align: center; border: 1px solid var(--card); min-width: 3rem; }
.matrix thead th { text-align: center; }
.pictures { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, 9rem); }
figure { margin: 0; font-size: .85rem; overflow-wrap: anywhere; }
figure img { width: 6rem; height: 6rem; object-fit: contain; image-rendering: pixelated; }
svg { display: block; width: 100%; height: auto; font-size: 15px; }
svg text { fill: var(--soft); } .grid { stroke: var(--edge); fill: none; }
.line { stroke: rgb(var(--accent)); stroke-width: 2; fill: none; stroke-linejoin: round; }
.dot { fill: rgb(var(--accent)); }
@media (max-width: 30rem) { main { padding: 1rem .5rem; } section { padding: .75rem; }
  th, td { padding: .3rem .4rem; } }
"""


# Title, names of columns, rows of text.
DataTable = tuple[str, Sequence[str], Sequence[Sequence[str]]]


# Scores of a label, as the page calls them.
_SCORES = {
    **{"precision": "precision", "recall": "recall", "f1": "F1", "iou": "IoU"},
    **{"ap": "AP", "ap_50": "AP50"},
}
COUNTED = {"iou": "pixels", "ap": "boxes"}
"""What is counted of a label that has such a score; rows where it has none of them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportData:
    """What a report shows, as plain values.

    Attributes:
        name: Name of the run.
        settings: What was chosen, by the name to show.
        split: Split that the metrics and the confusion matrix are of.
        rows: Number of its rows.
        metrics: "base", "adapter", "merged" (in the order to show) to metric name to value.
        losses: (step, training loss).
        learning_rates: (step, learning rate).
        metric: Name of the selecting metric.
        evaluations: (step, value of the selecting metric); step 0 is before training.
        labels: Label names in order; empty for a task without classes.
        confusion: Rows by true label and predicted label, ``confusion[true][predicted]``; empty
            where a row is not of one label.
        classes: For each label its precision, recall, f1 and support.
        averages: "macro" and "weighted", each like one of `classes`.
        notes: Sentences to show under the title.
        data: What the rows are like: a title, the names of columns, and rows of text, each.
        pictures: Rows that the adapter got wrong: a picture as a data URI, and a text, each.
    """

    name: str
    settings: Mapping[str, str]
    split: str
    rows: int
    metrics: Mapping[str, Mapping[str, float]]
    losses: Points
    learning_rates: Points
    metric: str
    evaluations: Points
    labels: Sequence[str] = ()
    confusion: Sequence[Sequence[int]] = ()
    classes: Sequence[Mapping[str, float]] = ()
    averages: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    notes: Sequence[str] = ()
    data: Sequence[DataTable] = ()
    pictures: Sequence[tuple[str, str]] = ()


def write_report(path: Path, report: ReportData) -> None:
    """Write the report as a whole or not at all.

    Raises:
        OSError: If writing failed; a report that was there is then as it was.
    """
    replace_file(path, render_report(report).encode("utf-8", errors="replace"))


def render_report(report: ReportData) -> str:
    """Return the page."""
    sections = [
        _section(f"Before and after, {report.split} split, {report.rows} rows", _metrics(report)),
        _side_by_side(
            _section("Training loss", line_chart(report.losses, x_label="step", y_label="loss")),
            _section(
                f"Validation: {report.metric}",
                line_chart(report.evaluations, x_label="step", y_label=report.metric, markers=True),
            ),
            _section(
                "Learning rate",
                line_chart(report.learning_rates, x_label="step", y_label="learning rate"),
            ),
        ),
    ]
    if report.labels:
        scores = _section("Labels", _classes(report))
        parts = (_confusion(report), scores) if report.confusion else (scores,)
        narrow = len(parts) > 1 and len(report.labels) <= _NARROW_MATRIX
        sections += [_side_by_side(*parts)] if narrow else parts
    if report.pictures:
        sections.append(_section("Wrong, the surest first", _pictures(report.pictures)))
    for title, head, rows in report.data:
        lines = [_row(row[0], row[1:]) for row in rows]
        sections.append(_section(title, _table(head, lines)))
    sections.append(_section("Settings", _settings(report.settings)))
    notes = "".join(f'<p class="soft">{escape(note)}</p>' for note in report.notes)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\">"
        f"<title>{escape(report.name)}</title><style>{_CSS}</style></head>\n"
        f"<body><main><h1>{escape(report.name)}</h1>{notes}\n"
        + "\n".join(sections)
        + "\n</main></body></html>\n"
    )


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{body}</section>"


def _side_by_side(*sections: str) -> str:
    return f'<div class="pair">{"".join(sections)}</div>'


def _table(head: Sequence[str], rows: Sequence[str], *, kind: str = "") -> str:
    """Return a table; `head` is plain text, `rows` are finished ``<tr>`` elements."""
    cells = "".join(f'<th scope="col">{escape(text)}</th>' for text in head)
    top = f"<thead><tr>{cells}</tr></thead>" if head else ""
    return (
        f'<div class="scroll" tabindex="0"><table class="{kind}">{top}'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _row(name: str, cells: Sequence[str]) -> str:
    values = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
    return f'<tr><th scope="row">{escape(name)}</th>{values}</tr>'


def _metrics(report: ReportData) -> str:
    names = list(dict.fromkeys(name for values in report.metrics.values() for name in values))
    rows = [
        _row(name, [_number(values.get(name)) for values in report.metrics.values()])
        for name in names
    ]
    return _table(["metric", *report.metrics], rows)


def _confusion(report: ReportData) -> str:
    """Return a section: the matrix, or its largest errors where it would fill the screen."""
    if len(report.labels) > _LARGEST_MATRIX:
        wrong = sorted(
            (
                (count, true, predicted)
                for true, counts in enumerate(report.confusion)
                for predicted, count in enumerate(counts)
                if count and true != predicted
            ),
            key=lambda cell: (-cell[0], cell[1], cell[2]),
        )
        rows = [
            _row(report.labels[true], [report.labels[predicted], str(count)])
            for count, true, predicted in wrong[:_MOST_CONFUSED]
        ]
        title = f"Most confused labels ({len(rows)} of {len(wrong)} pairs)"
        return _section(title, _table(["true", "predicted", "rows"], rows))
    rows = []
    for label, counts in zip(report.labels, report.confusion, strict=True):
        total = sum(counts) or 1
        cells = "".join(
            f'<td style="background:rgb(var(--accent) / {0.65 * count / total:.3f})">{count:d}</td>'
            for count in counts
        )
        rows.append(f'<tr><th scope="row">{escape(label)}</th>{cells}</tr>')
    legend = '<p class="soft">Rows are true labels, columns predicted ones.</p>'
    table = _table(["", *report.labels], rows, kind="matrix")
    return _section("Confusion matrix", legend + table)


def _classes(report: ReportData) -> str:
    shown = [name for name in _SCORES if all(name in scores for scores in report.classes)]
    rows = [
        _row(
            label,
            [f"{scores[name]:.3f}" for name in shown] + [f"{scores['support']:.0f}"],
        )
        for label, scores in [
            *zip(report.labels, report.classes, strict=True),
            *((f"{name} average", scores) for name, scores in report.averages.items()),
        ]
    ]
    counted = next((COUNTED[name] for name in shown if name in COUNTED), "rows")
    return _table(["label", *(_SCORES[name] for name in shown), counted], rows)


def _pictures(pictures: Sequence[tuple[str, str]]) -> str:
    shown = "".join(
        f'<figure><img src="{escape(uri)}" alt=""><figcaption>{escape(text)}</figcaption></figure>'
        for uri, text in pictures
    )
    return f'<div class="pictures">{shown}</div>'


def _settings(settings: Mapping[str, str]) -> str:
    rows = [_row(name, [value]) for name, value in settings.items()]
    return _table([], rows, kind="settings")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"

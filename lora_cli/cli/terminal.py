"""Showing what a command does: rich on a terminal, plain lines elsewhere."""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from rich import box
from rich.console import Console, JustifyMethod
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table
from rich.text import Text

from lora_cli.cli.render import printable
from lora_cli.training.events import (
    BatchHalved,
    EvalDone,
    EvalProgress,
    EvalStarted,
    Event,
    RunEnded,
    RunStarted,
    StepDone,
)

Item = TypeVar("Item")

# Fewer items than this are done before a bar could be read.
_WORTH_A_BAR = 2000


class Terminal:
    """Writes messages and progress to stderr, tables and results to stdout.

    Args:
        as_json: Whether stdout is for one JSON object; tables then go to stderr.
        quiet: Whether to leave out notes, progress and tables.
    """

    def __init__(self, *, as_json: bool, quiet: bool) -> None:
        self._as_json = as_json
        self._quiet = quiet
        self._messages = Console(stderr=True, highlight=False, soft_wrap=True)
        # A table that goes to a file or pipe keeps its width, whatever the terminal's is.
        width = None if sys.stdout.isatty() else 200
        self._results = self._messages if as_json else Console(highlight=False, width=width)
        self._live: Progress | None = None
        self._train_bar = self._eval_bar = TaskID(0)
        self._shown = ""
        # Of the table of evaluations: its columns so far, and what training was at last.
        self._columns: list[str] = []
        self._epoch, self._loss = "", ""

    def note(self, text: str) -> None:
        """Show one line of information."""
        if not self._quiet:
            self._console().print(_literal(text))

    def table(
        self,
        title: str,
        columns: Sequence[str],
        rows: Sequence[Sequence[str]],
        *,
        is_result: bool = True,
        are_numbers: bool = True,
    ) -> None:
        """Show a table; the first column is left-aligned, and what are no numbers as well.

        What is no result goes to stderr, as other messages do.
        """
        if self._quiet:
            return
        table = Table(
            title=_literal(title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False
        )
        for number, name in enumerate(columns):
            justify: JustifyMethod = "left" if number == 0 or not are_numbers else "right"
            table.add_column(_literal(name), justify=justify, overflow="fold")
        for row in rows:
            table.add_row(*(_literal(cell) for cell in row))
        console = self._results if is_result else self._console()
        if console.is_terminal:
            console.print(table)
            return
        # In a file or pipe nothing has to be painted over up to the right margin.
        with console.capture() as shown:
            console.print(table)
        print(*(line.rstrip() for line in shown.get().splitlines()), sep="\n", file=console.file)

    def output(self, text: str) -> None:
        """Write a line to stdout at once."""
        print(text, flush=True)

    def piece(self, text: str) -> None:
        """Write a part of a line to stdout at once."""
        print(text, end="", flush=True)

    def result(self, value: dict[str, Any]) -> None:
        """Write the result as one JSON object, if `--json` asked for it."""
        if self._as_json:
            print(json.dumps(value, ensure_ascii=False), flush=True)

    def track(self, label: str, items: Sequence[Item]) -> Iterator[Item]:
        """Yield the items; show a bar for many of them on a terminal."""
        if self._quiet or not self._messages.is_terminal or len(items) < _WORTH_A_BAR:
            yield from items
            return
        with self._progress() as progress:
            bar = progress.add_task(label, total=len(items), numbers="")
            for item in items:
                yield item
                progress.advance(bar)

    @contextmanager
    def transfer(self, label: str, num_bytes: int) -> Iterator[Callable[[int], None]]:
        """Give a function that is told of bytes as they are done; a bar shows them."""
        if self._quiet or not self._messages.is_terminal:
            yield lambda _: None
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            TextColumn("left"),
        )
        with Progress(*columns, console=self._messages, transient=True) as progress:
            bar = progress.add_task(label, total=num_bytes)
            yield lambda size: progress.advance(bar, size)

    def on_event(self, event: Event) -> None:
        """Show the training loop: bars that move on a terminal, a line per report elsewhere."""
        if self._quiet:
            return
        match event:
            case RunStarted():
                self._start(event)
            case StepDone():
                self._step(event)
            case EvalStarted(rows=rows) if self._live:
                self._live.reset(self._eval_bar, total=rows, visible=True)
            case EvalProgress(rows=rows) if self._live:
                self._live.update(self._eval_bar, completed=rows)
            case EvalDone():
                self._evaluated(event)
            case BatchHalved():
                what = "micro-batches" if event.kind == "train" else "batches in evaluation"
                self.note(f"out of memory: {what} of {event.rows} rows from here on")
            case RunEnded():
                self.close()
                self.note(
                    f"{event.reason} at step {event.step} after {event.seconds:.0f} s, "
                    f"{event.samples_per_second:.0f} samples/s while training"
                )
            case _:
                pass

    def close(self) -> None:
        """Take bars off the screen; safe to call at any time."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _console(self) -> Console:
        return self._messages if self._live is None else self._live.console

    def _progress(self) -> Progress:
        return Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("left"),
            TextColumn("{task.fields[numbers]}"),
            console=self._messages,
            transient=True,
        )

    def _start(self, event: RunStarted) -> None:
        self.note(
            f"training: {event.train_rows:,} rows, {event.steps_per_epoch} steps an epoch, "
            f"{event.total_steps} steps in all"
        )
        self._total = event.total_steps
        if self._messages.is_terminal:
            self._live = self._progress()
            self._train_bar = self._live.add_task(
                "train", total=event.total_steps, completed=event.first_step, numbers=""
            )
            self._eval_bar = self._live.add_task("eval", total=1, visible=False, numbers="")
            self._live.start()

    def _step(self, event: StepDone) -> None:
        self._epoch, self._loss = f"{event.epoch:.2f}", f"{event.loss:.4f}"
        numbers = (
            f"loss {event.loss:.4f}  lr {event.lr:.2e}  {event.samples_per_second:.0f} samples/s"
        )
        if self._live is not None:
            self._shown = numbers if event.log or not self._shown else self._shown
            self._live.update(self._train_bar, completed=event.step, numbers=self._shown)
        elif event.log:
            self.note(f"step {event.step}/{self._total}  epoch {event.epoch:.2f}  {numbers}")

    def _evaluated(self, event: EvalDone) -> None:
        if self._live is not None:
            self._live.update(self._eval_bar, visible=False)
            self._add_row(event)
            return
        values = "  ".join(f"{name} {value:.4f}" for name, value in event.metrics.items())
        when = "before training" if event.step == 0 else f"step {event.step}"
        best = "  (best so far)" if event.is_best else ""
        self.note(f"eval {when}: {values}{best}")

    def _add_row(self, event: EvalDone) -> None:
        """Show an evaluation as a line of a table that grows while the bars move below it."""
        columns = ["step", "epoch", "train loss", *event.metrics]
        if columns != self._columns:
            self._columns = columns
            self._console().print(_literal(_aligned(columns, columns)), style="bold")
        cells = [str(event.step), self._epoch, self._loss]
        cells += [f"{value:.4f}" for value in event.metrics.values()]
        self.note(_aligned(cells, columns) + ("  best" if event.is_best else ""))


def _aligned(cells: Sequence[str], columns: Sequence[str]) -> str:
    """Put cells under the names of their columns, right-aligned."""
    widths = [max(len(name), 6) for name in columns]
    return "  ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True))


def _literal(text: str) -> Text:
    """Keep rich from reading markup or emoji names in a text, and the terminal from codes in it."""
    return Text(printable(text))

"""`lora-cli predict`: labels for new rows, streamed in the order of the input."""

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import Any

from lora_cli.artifacts.adapter import find_subject
from lora_cli.artifacts.merged import check_output
from lora_cli.artifacts.room import make_room
from lora_cli.commands.classifying import with_labels
from lora_cli.commands.display import Display
from lora_cli.commands.opening import open_adapter
from lora_cli.commands.options import Options
from lora_cli.commands.writing import with_generation
from lora_cli.config.commands import PredictConfig
from lora_cli.config.composed import Composed
from lora_cli.data.files import iter_rows
from lora_cli.data.media_folders import rows_of_media
from lora_cli.data.plain import json_value
from lora_cli.data.types import Row
from lora_cli.errors import Problem, RunFailedError, UserError
from lora_cli.tasks.contract import Features, Task
from lora_cli.training.evaluation import evaluate_rows
from lora_cli.training.runtime import default_device


def run(composed: Composed, options: Options, display: Display) -> int:
    """Predict every row of the input; return the exit code."""
    config: PredictConfig = composed.config
    # Before the rows, which may come from a person or a program that is slow to write.
    find_subject(config.from_ or "")
    rows = _rows(config)
    first = next(rows, None)
    if first is None:
        raise UserError(
            Problem(
                id="predict.no-rows",
                message="`input` must hold at least one row, but is empty.",
                key="input",
                fix="give a file with rows, or text=TEXT",
            )
        )
    output = None if config.output == "-" else Path(config.output)
    if output is not None:
        check_output(
            output,
            key="output",
            overwrite=options.overwrite,
            is_file=True,
            inputs=[Path(config.input_)],
        )
    opened = open_adapter(config.from_ or "", base=config.base, display=display)
    if config.text is not None and opened.family.processor != "tokenizer":
        raise UserError(_no_text(opened.config.task.family))
    state = opened.family.bind_columns(list(first.values), opened.record.state, where=first.source)
    opened.family.check_row(first, state)
    settings = with_generation(opened.config.task, config.generation)
    settings = with_labels(settings, config.zero_shot)
    task = opened.family.build(settings, state, opened.processor)

    def encode(row: Row) -> Features:
        opened.family.check_row(row, state)
        return task.encode(row)

    encode(first)
    model = opened.attach()
    reader = _Reader(chain([first], rows), encode)
    count = 0
    with _writer(output, display) as write:
        while chunk := reader.take(config.batch_size):
            for line in _predict(chunk, task, model, config.batch_size):
                write(line)
            count += len(chunk)
    if reader.problems:
        kept = Problem(
            id="predict.incomplete",
            message=f"Every row must be predicted, but only the first {count:,} were.",
            where=str(output or "standard output"),
            fix="correct the row above and predict again",
        )
        raise RunFailedError([*reader.problems, kept])
    if output is not None:
        display.note(f"{count:,} predictions: {output}")
        display.result({"predictions": count, "output": str(output)})
    return 0


def _no_text(family: str) -> Problem:
    return Problem(
        id="predict.no-text",
        message=f"`text` must be left out with an adapter for {family}, which reads no texts.",
        key="text",
        allowed="input=FILE or input=FOLDER",
        fix="name a file, a folder of files, or rows with their paths: input=PATH",
    )


class _Reader:
    """Takes rows in chunks; the first bad row ends the input, and is kept for the end."""

    def __init__(self, rows: Iterator[Row], encode: Callable[[Row], Features]) -> None:
        self.problems: tuple[Problem, ...] = ()
        self._rows = self._encoded(rows, encode)

    def _encoded(
        self, rows: Iterator[Row], encode: Callable[[Row], Features]
    ) -> Iterator[tuple[Row, Features]]:
        try:
            for row in rows:
                yield row, encode(row)
        except UserError as error:
            self.problems = error.problems

    def take(self, size: int) -> list[tuple[Row, Features]]:
        """Return up to `size` further rows, encoded; none at the end."""
        return list(islice(self._rows, size))


def _rows(config: PredictConfig) -> Iterator[Row]:
    """Return the rows to predict, read as they are needed."""
    if config.text is not None:
        _check_text(config.text)
        return iter([Row("1", {"text": config.text}, "text", 1)])
    layout = None if config.format_ == "auto" else config.format_
    if config.input_ == "-":
        return iter_rows(sys.stdin.buffer, layout=layout)
    path = Path(config.input_)
    media = rows_of_media(path) if layout is None else ()
    return iter(media) if media else iter_rows(path, layout=layout)


def _check_text(text: str) -> None:
    """Refuse a text of the command line whose bytes were no UTF-8: Python has half characters."""
    wrong = next((n for n, character in enumerate(text) if "\ud800" <= character <= "\udfff"), None)
    if wrong is not None:
        raise UserError(
            Problem(
                id="predict.bad-text",
                message=f"`text` must be UTF-8 text, but is not at character {wrong + 1}.",
                key="text",
                fix="use a terminal in UTF-8, or write the text into a file: input=FILE",
            )
        )


def _predict(
    rows: Sequence[tuple[Row, Features]], task: Task, model: Callable[..., Any], batch_size: int
) -> Iterator[str]:
    """Yield one line of JSON a row: the prediction, and the input's own columns.

    A column of the input that has the name of a prediction key is kept as ``input_<name>``, unless
    the prediction repeats it.
    """
    features = [encoded for _, encoded in rows]
    evaluation = evaluate_rows(
        task, model, features, batch_size=batch_size, device=default_device()
    )
    for (row, _), prediction in zip(rows, evaluation.predictions, strict=True):
        line = task.to_json(prediction)
        own = {name: json_value(value) for name, value in _without_files(row.values).items()}
        line["id"] = own.pop("id", line["id"])
        for name, value in own.items():
            if name not in line:
                line[name] = value
            elif line[name] != value:
                line[f"input_{name}"] = value
        yield json.dumps(line, ensure_ascii=False)


def _without_files(value: Any) -> Any:
    """Return what of a row is not the content of a file, which is too long to be repeated."""
    if isinstance(value, list):
        return [_without_files(item) for item in value]
    if not isinstance(value, Mapping):
        return value
    is_file = isinstance(value.get("bytes"), bytes)
    return {
        name: _without_files(part)
        for name, part in value.items()
        if not (is_file and name == "bytes")
    }


@contextmanager
def _writer(output: Path | None, display: Display) -> Iterator[Callable[[str], None]]:
    """Give a function that writes a line at once, so that a reader can follow."""
    if output is None:
        yield display.output
        return
    make_room(output)
    with output.open("w", encoding="utf-8") as file:

        def write(line: str) -> None:
            file.write(line + "\n")
            file.flush()

        yield write

"""`lora-cli train RECIPE smoke=true`: the whole way of a recipe, in seconds, without the network.

A narrow random model of the same architecture stands in for the base, and a few rows for the data.
It is trained, read back, evaluated, merged and used by the same code as any run, in a folder that
is removed at the end.
"""

import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_cli.commands import eval as evaluating
from lora_cli.commands import merge as merging
from lora_cli.commands import predict as predicting
from lora_cli.commands.display import Display, Item
from lora_cli.commands.options import Options
from lora_cli.commands.smoke_inputs import shrink_run
from lora_cli.config.commands import EvalConfig, PredictConfig, TrainConfig
from lora_cli.config.composed import Composed
from lora_cli.config.merging import MergeConfig
from lora_cli.config.schema import to_plain
from lora_cli.data.plain import json_value
from lora_cli.errors import Problem, RunFailedError, UserError
from lora_cli.lora.strategies import why_unmergeable
from lora_cli.ranks import world_size
from lora_cli.tasks.table import FAMILIES
from lora_cli.training.events import Event

_PREDICTED_ROWS = 4
_TOLERANCE = 1e-6

Run = Callable[[Composed, Options, Display], int]


class _Silent:
    """A display that keeps the result of a command, and shows nothing."""

    def __init__(self) -> None:
        self.found: dict[str, Any] = {}

    def note(self, text: str) -> None:
        """Show nothing."""

    def table(
        self,
        title: str,
        columns: Sequence[str],
        rows: Sequence[Sequence[str]],
        *,
        is_result: bool = True,
        are_numbers: bool = True,
    ) -> None:
        """Show nothing."""

    def track(self, label: str, items: Sequence[Item]) -> Iterator[Item]:
        """Yield the items."""
        del label
        yield from items

    def transfer(self, label: str, num_bytes: int) -> AbstractContextManager[Callable[[int], None]]:
        """Show nothing."""
        del label, num_bytes
        return nullcontext(lambda _: None)

    def on_event(self, event: Event) -> None:
        """Show nothing."""

    def output(self, text: str) -> None:
        """Show nothing."""

    def piece(self, text: str) -> None:
        """Show nothing."""

    def result(self, value: dict[str, Any]) -> None:
        """Keep the result."""
        self.found = value


def run(composed: Composed, options: Options, display: Display, *, train: Run) -> int:
    """Try a recipe; return the exit code.

    Args:
        composed: The configuration of `train`.
        options: Flags.
        display: Told of each stage.
        train: What trains.

    Raises:
        UserError: If the recipe, the model's settings or the data are wrong.
        RunFailedError: If what was read back is not what was trained.
    """
    if world_size() > 1:
        raise UserError(_several_processes())
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="lora-cli-smoke-") as name:
        folder = Path(name)
        config, told = shrink_run(composed.config, folder)
        for text in told:
            display.note(f"smoke: {text}")
        stages = _Stages(folder / "run", options, display)
        stages.train(replace(composed, config=config, plain=to_plain(config)), train)
        stages.evaluate(is_quantized=config.model.quantization != "none")
        stages.merge(config.strategy.name)
        stages.predict(_rows_to_predict(config, folder))
    seconds = time.monotonic() - began
    display.note(f"smoke: passed in {seconds:.1f} s; nothing was kept")
    display.result({"smoke": "passed", "seconds": seconds, "notes": told, "stages": stages.seconds})
    return 0


class _Stages:
    """The commands, one after the other, on one run directory."""

    def __init__(self, run: Path, options: Options, display: Display) -> None:
        self.seconds: dict[str, float] = {}
        self._run, self._display = run, display
        self._options = replace(options, resume=False, overwrite=False)
        self._trained: Mapping[str, Any] = {}

    def train(self, composed: Composed, train: Run) -> None:
        """Train; the result is kept for `evaluate`."""
        self._trained = self._do("train", train, composed)
        loss = self._trained["adapter"].get("loss")
        self._tell("train", f"{self._trained['steps']} steps", loss)

    def evaluate(self, *, is_quantized: bool) -> None:
        """Read the adapter back, and compare its metrics with those at the end of training.

        These are others where the base was quantized in training, since it is not in `eval`.
        """
        found = self._do(
            "eval", evaluating.run, EvalConfig(from_=str(self._run), split="validation")
        )
        if is_quantized:
            self._tell("eval", "the adapter was read back, and put into the base in full precision")
            return
        for name, value in self._trained["adapter"].items():
            again = found["adapter"].get(name)
            if again is None or not abs(again - value) <= _TOLERANCE * max(1.0, abs(value)):
                raise RunFailedError(_other_numbers(name, value, again))
        self._tell("eval", "the adapter that was read back gives the same metrics")

    def merge(self, strategy: str) -> None:
        """Merge, where that can be done: the command compares what it has written."""
        if why := why_unmergeable(strategy):
            self._display.note(f"smoke: not merged: {why}")
            return
        output = str(self._run.parent / "merged")
        config = MergeConfig(from_=str(self._run), output=output, verify="logits")
        found = self._do("merge", merging.run, config)
        difference = found.get("max_abs_difference")
        more = "" if difference is None else f", outputs differ by {difference:.1e} at most"
        self._tell("merge", f"the merged model was read back{more}")

    def predict(self, rows: Path) -> None:
        """Predict rows of a file."""
        output = self._run.parent / "predictions.jsonl"
        config = PredictConfig(from_=str(self._run), input_=str(rows), output=str(output))
        found = self._do("predict", predicting.run, config)
        self._tell("predict", f"{found['predictions']} rows")

    def _do(self, name: str, command: Run, config: Any) -> Mapping[str, Any]:
        """Run a command without showing what it shows; return its result."""
        if not isinstance(config, Composed):
            config = Composed(
                command=name, config=config, plain=to_plain(config), user={}, choices={}, origins={}
            )
        silent, began = _Silent(), time.monotonic()
        code = command(config, self._options, silent)
        self.seconds[name] = time.monotonic() - began
        if code != 0:
            raise RunFailedError(_stopped(name, code))
        return silent.found

    def _tell(self, name: str, text: str, loss: float | None = None) -> None:
        more = "" if loss is None else f", validation loss {loss:.4f}"
        self._display.note(f"smoke: {name:<8} {text}{more} ({self.seconds[name]:.1f} s)")


def _rows_to_predict(config: TrainConfig, folder: Path) -> Path:
    """Write some validation rows as they came, and return the file."""
    rows = FAMILIES[config.task.family].load(config.task, seed=config.seed).rows["validation"]
    path = folder / "rows.jsonl"
    lines = [
        json.dumps(json_value(row.values), ensure_ascii=False) + "\n"
        for row in rows[:_PREDICTED_ROWS]
    ]
    path.write_text("".join(lines), encoding="utf-8")
    return path


def _several_processes() -> Problem:
    return Problem(
        id="smoke.one-process",
        message=f"`smoke=true` must run in one process, but was started in {world_size()}.",
        key="smoke",
        fix="start lora-cli train without torchrun or accelerate",
    )


def _other_numbers(name: str, value: float, again: float | None) -> Problem:
    return Problem(
        id="smoke.other-metrics",
        message=f"The adapter must give the {name} of the end of training, {value!r}, when it is "
        f"read back, but gives {again!r}.",
        fix="this is a bug of lora-cli, please report it",
    )


def _stopped(name: str, code: int) -> Problem:
    return Problem(
        id="smoke.stopped",
        message=f"`{name}` must run to its end, but was stopped with exit code {code}.",
        fix="try again",
    )

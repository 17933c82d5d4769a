"""One contender of `speed.py`: trains a block of steps whenever a line of its input asks for it.

A line holds a number of optimizer steps; the answer is a line of JSON. Both sorts of contender read
and tokenize their rows through lora-cli, and start from adapters that are drawn by name.
"""

import argparse
import json
import os
import random
import resource
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

from lora_cli.config.adapters import LoraConfig
from lora_cli.config.commands import TrainConfig
from lora_cli.config.language import ChatConfig
from lora_cli.config.optim import AdamWConfig, ConstantConfig
from lora_cli.config.sections import ModelConfig, TrainerConfig
from lora_cli.config.tasks import DataConfig, TextClassificationConfig
from lora_cli.models.processors import load_processor
from lora_cli.models.sources import resolve_model
from lora_cli.tasks.table import FAMILIES

SEED, R, ALPHA = 1, 8, 16
LR = 1e-3
TARGETS = {"classification": ("query", "value"), "chat": ("q_proj", "v_proj")}
CLASSES = {
    "classification": "AutoModelForSequenceClassification",
    "chat": "AutoModelForCausalLM",
}


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    for name in ("case", "data", "model"):
        add(f"--{name}", required=True)
    add("--batch", type=int, required=True, help="rows of a step")
    add("--total", type=int, required=True, help="optimizer steps that may be asked for")
    add("--trainer", action="store_true", help="be PEFT + Trainer")
    add("--bf16", action="store_true")
    add("--grouped", action="store_true", help="put rows of like length into a batch")
    add("--padded", action="store_true", help="let lora-cli compute padding")
    return parser.parse_args()


def configure(args: argparse.Namespace) -> TrainConfig:
    """Return the settings, which are those of both sorts of contender."""
    data = DataConfig(path=args.data)
    task: Any = TextClassificationConfig(data=data, max_length=128)
    if args.case == "chat":
        task = ChatConfig(data=data, max_length=512)
    return TrainConfig(
        model=ModelConfig(path=args.model, dtype="float32"),
        task=task,
        lora=LoraConfig(r=R, alpha=ALPHA, targets=TARGETS[args.case]),
        optimizer=AdamWConfig(lr=LR),
        scheduler=ConstantConfig(),
        trainer=TrainerConfig(
            max_steps=args.total,
            global_batch_size=args.batch,
            log_steps=1,
            precision="bf16" if args.bf16 else "float32",
            padding_free=not args.padded,
        ),
        seed=SEED,
    )


def draw_start(model: nn.Module) -> None:
    """Draw what is trained by name, the same in every contender; switch dropout off."""
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        plain = name.removeprefix("base_model.model.").replace(".default", "")
        plain = plain.replace("modules_to_save.", "")
        draw = torch.Generator().manual_seed(zlib.crc32(plain.encode()))
        with torch.no_grad():
            if "lora_B" in plain:
                parameter.zero_()
            else:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=draw))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


class Turns:
    """Waits for the next turn, and reports the last one."""

    def __init__(self) -> None:
        self.steps = 0
        self._losses: list[float] = []
        self._rows = 0

    def wait(self) -> None:
        """Read how many steps are asked for; end the process where there are no more."""
        line = sys.stdin.readline()
        if not line:
            sys.stdout.flush()
            os._exit(0)
        self.steps, self._losses, self._rows = int(line), [], 0
        self._busy, self._own = _busy_seconds(), time.process_time()
        self._began = time.monotonic()

    def count(self, rows: int, loss: float) -> None:
        """Note a step, and after the last one of a turn report and wait."""
        self._losses.append(loss)
        self._rows += rows
        if len(self._losses) < self.steps:
            return
        seconds = time.monotonic() - self._began
        others = _busy_seconds() - self._busy - (time.process_time() - self._own)
        result = {
            "seconds": seconds,
            "rows": self._rows,
            "losses": self._losses,
            "others": max(0.0, others) / (seconds * (os.cpu_count() or 1)),
            "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }
        print(json.dumps(result), flush=True)
        self.wait()


def _busy_seconds() -> float:
    """Return the processor seconds that the machine has spent on anything, 0 where unknown."""
    path = Path("/proc/stat")
    if not path.is_file():
        return 0.0
    user, nice, system = map(int, path.read_text().split("\n", 1)[0].split()[1:4])
    return (user + nice + system) / os.sysconf("SC_CLK_TCK")


class Quiet:
    """A display that shows nothing."""

    def note(self, text: str) -> None:
        """Show nothing."""

    def table(self, *_: Any, **__: Any) -> None:
        """Show nothing."""

    def track(self, label: str, items: Sequence[Any]) -> Iterator[Any]:
        """Show nothing."""
        del label
        yield from items


def run_ours(args: argparse.Namespace, turns: Turns) -> None:
    """Train with lora-cli's own loop."""
    from lora_cli.commands.building import build_plan
    from lora_cli.commands.preparing import prepare
    from lora_cli.training.events import StepDone
    from lora_cli.training.loop import Trainer
    from lora_cli.training.runtime import Runtime

    config = configure(args)
    display: Any = Quiet()
    prepared = prepare(config, display)
    draw_start(prepared.model)

    def listen(event: Any) -> None:
        if isinstance(event, StepDone):
            turns.count(len(event.ids), event.loss)

    trainer = Trainer(
        task=prepared.task,
        model=prepared.model,
        saved_modules=prepared.saved,
        plan=build_plan(prepared, config, is_second=False),
        runtime=Runtime(precision=config.trainer.precision),
        listeners=[listen],
    )
    turns.wait()
    while True:
        trainer._train_step()


def batches_of(args: argparse.Namespace) -> tuple[Any, list[Any], int]:
    """Return the task, the rows in the order of lora-cli's steps, and the number of labels."""
    from lora_cli.training.order import step_rows

    config = configure(args)
    family = FAMILIES[config.task.family]
    splits = family.load(config.task, seed=SEED)
    source = resolve_model(args.model, revision=None, processor=family.processor)
    task = family.build(config.task, splits.state, load_processor(source, family.processor))
    rows = [task.encode(row) for row in splits.rows["train"]]
    order: list[Any] = []
    for step in range(args.total):
        _, indices = step_rows(len(rows), seed=SEED, global_batch_size=args.batch, step=step)
        if len(indices) < args.batch:
            raise SystemExit("too few rows for so many steps: give more rows or fewer repetitions")
        order += [rows[index] for index in indices]
    return task, order, len(splits.state.get("labels", ()))


def collate(task: Any, features: Sequence[Any]) -> dict[str, torch.Tensor]:
    """Return the batch as a model of transformers reads it, with its labels."""
    batch = task.collate(features)
    if "learned" not in batch:
        return {**batch["inputs"], "labels": batch["labels"]}
    ids = batch["inputs"]["input_ids"]
    return {**batch["inputs"], "labels": ids.masked_fill(~batch["learned"], -100)}


def adapted_by_peft(args: argparse.Namespace, labels: int) -> nn.Module:
    """Return the base model with PEFT's adapters, at their start."""
    import peft
    import transformers

    more = {"num_labels": labels} if labels else {}
    folder = resolve_model(args.model).folder
    base = getattr(transformers, CLASSES[args.case]).from_pretrained(
        folder, dtype=torch.float32, **more
    )
    kind = "SEQ_CLS" if args.case == "classification" else "CAUSAL_LM"
    config = peft.LoraConfig(
        task_type=kind, r=R, lora_alpha=ALPHA, target_modules=list(TARGETS[args.case])
    )
    model: nn.Module = peft.get_peft_model(base, config)
    draw_start(model)
    return model


def run_theirs(args: argparse.Namespace, turns: Turns) -> None:
    """Train with PEFT and the Trainer of transformers, at their defaults but for the options."""
    import transformers

    task, order, labels = batches_of(args)
    model = adapted_by_peft(args, labels)

    class Sequential(transformers.Trainer):
        """Takes the rows as they come, unless it groups them."""

        def _get_train_sampler(self, *given: Any, **named: Any) -> Any:
            if args.grouped:
                return super()._get_train_sampler(*given, **named)
            return torch.utils.data.SequentialSampler(self.train_dataset)

    class Steps(transformers.TrainerCallback):
        """Takes turns."""

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            """Wait for the first turn."""
            turns.wait()

        def on_log(self, *_: Any, logs: Any = None, **__: Any) -> None:
            """Count a step, whose loss it is."""
            if "loss" in logs:
                turns.count(args.batch, logs["loss"])

    rows = [{"row": row, "length": row["length"]} for row in order]
    with tempfile.TemporaryDirectory() as output:
        trainer = Sequential(
            model=model,
            args=transformers.TrainingArguments(
                output_dir=output,
                max_steps=args.total,
                learning_rate=LR,
                lr_scheduler_type="constant",
                per_device_train_batch_size=args.batch,
                bf16=args.bf16,
                logging_steps=1,
                train_sampling_strategy="group_by_length" if args.grouped else "random",
                remove_unused_columns=False,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=not torch.cuda.is_available(),
                seed=SEED,
            ),
            train_dataset=transformers_rows(rows),
            data_collator=lambda features: collate(task, [one["row"] for one in features]),
            callbacks=[Steps()],
        )
        trainer.remove_callback(transformers.PrinterCallback)  # prints to stdout
        trainer.train()
    _wait_for_the_end(turns)


def transformers_rows(rows: list[dict[str, Any]]) -> Any:
    """Return rows as a data set whose lengths the Trainer finds."""

    class Rows(torch.utils.data.Dataset[dict[str, Any]]):
        def __len__(self) -> int:
            return len(rows)

        def __getitem__(self, index: int) -> dict[str, Any]:
            # The sampler that groups by length reads the length of "input_ids".
            return {**rows[index], "input_ids": range(rows[index]["length"])}

    return Rows()


def _wait_for_the_end(turns: Turns) -> NoReturn:
    while True:
        turns.wait()


def main() -> None:
    """Train whenever asked."""
    args = parse_arguments()
    random.seed(SEED)
    torch.manual_seed(SEED)
    (run_theirs if args.trainer else run_ours)(args, Turns())


if __name__ == "__main__":
    main()

"""A recipe cut down: a narrow random model in place of its base, and a few rows."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lora_cli.config.audio import SpeechRecognitionSeq2SeqConfig
from lora_cli.config.commands import TrainConfig
from lora_cli.config.distributed import DistributedConfig
from lora_cli.config.groups import group_options, option_values
from lora_cli.config.sections import TrainerConfig
from lora_cli.data.groups import LimitBelowGroupError
from lora_cli.data.sources import find_path
from lora_cli.data.types import Splits
from lora_cli.errors import UserError
from lora_cli.models.architecture import resolve_config
from lora_cli.models.base import load_config
from lora_cli.models.folders import has_processor
from lora_cli.models.processors import load_processor, tokenizer_of
from lora_cli.models.sources import resolve_model
from lora_cli.models.tiny import default_config, make_processor, write_tiny_model
from lora_cli.tasks.audio import longest_seconds
from lora_cli.tasks.contract import Family
from lora_cli.tasks.table import FAMILIES

_TRAIN_ROWS, _EVAL_ROWS = 16, 8
_BATCH, _STEPS, _NEW_TOKENS = 8, 4, 8
# More in a batch would take too long.
_BATCH_TOKENS = 4096
_WIDTH = 64
# Seconds of Whisper's own.
_WINDOW = 30
_LANGUAGES = ("source_language", "target_language", "language")
# What is asked of languages alone.
_OF_LANGUAGES = {"translate": False}
# Heads that a pretrained model has; the others are new on any model.
_PRETRAINED_HEADS = (
    "MaskedLM",
    "CausalLM",
    "Seq2SeqLM",
    "SpeechSeq2Seq",
    "ImageTextToText",
    "ObjectDetection",
)
_FIX = "model.architecture=TYPE, the model_type of its config.json, such as bert"


def shrink_run(config: TrainConfig, folder: Path) -> tuple[TrainConfig, list[str]]:
    """Write a small model, and rows where there are none to be had, and a configuration of both.

    Args:
        config: Of the recipe.
        folder: Where to write them, and where the run is to be.

    Returns:
        The configuration, and what is to be told of it.

    Raises:
        UserError: If the data that is there is wrong, or nothing is known of the model.
    """
    family = FAMILIES[config.task.family]
    task, told = _small_task(config, family, folder)
    task, splits = _load(task, family, config)
    task = _with_window(task, splits)
    text, is_read = _write_model(config, family, splits, folder / "model")
    told.append(text)
    # A tokenizer that was made up has no codes of languages.
    codes = [] if is_read else [name for name in _LANGUAGES if getattr(task, name, None)]
    if codes:
        also = {name: off for name, off in _OF_LANGUAGES.items() if hasattr(task, name)}
        task = replace(task, **dict.fromkeys(codes), **also)
        task, splits = _load(task, family, config)
    left_out = [*_unused(config), *(f"task.{name}" for name in codes)]
    count = _rows_of_a_batch(task, family, splits, folder / "model")
    if count < _BATCH:
        task = _limited(task, train=2 * count, evaluated=count)
        task, splits = _load(task, family, config)
        told.append(f"data: rows are long, so {len(splits.rows['train'])} of them are trained on")
    trainer = _short(config.trainer, count)
    for name in ("precision", "tf32"):
        if getattr(trainer, name) != getattr(config.trainer, name):
            left_out.append(f"trainer.{name}")
    if left_out:
        told.append(f"left out: {', '.join(left_out)}")
    model = replace(
        config.model,
        path=str(folder / "model"),
        revision=None,
        sha256=None,
        architecture=None,
        num_layers=None,
    )
    small = replace(
        config,
        smoke=False,
        task=task,
        model=model,
        trainer=trainer,
        run=replace(config.run, dir=str(folder / "run"), name=None),
        distributed=DistributedConfig(),
        tracker=(),
        adapter=None,
    )
    return small, told


def _unused(config: TrainConfig) -> list[str]:
    """Return the sections of a recipe that do not count here."""
    sections = (
        ("adapter", config.adapter is not None),
        ("tracker", bool(config.tracker)),
        ("distributed", config.distributed != DistributedConfig()),
    )
    return [name for name, is_set in sections if is_set]


def _load(task: Any, family: Family, config: TrainConfig) -> tuple[Any, Splits]:
    """Read few rows, and return them with the settings that say how few.

    Rows that are evaluated together may be more than the usual number.
    """
    most = config.task.data.max_eval_rows
    while True:
        try:
            return task, family.load(task, seed=config.seed)
        except LimitBelowGroupError as error:
            if most is not None and most < error.least:
                raise
            task = replace(task, data=replace(task.data, max_eval_rows=error.least))


def _with_window(task: Any, splits: Splits) -> Any:
    """Return the settings with a window, where a model has one, that is no longer than it must."""
    if not isinstance(task, SpeechRecognitionSeq2SeqConfig) or task.max_seconds is not None:
        return task
    rows = [row for part in splits.rows.values() for row in part]
    longest = longest_seconds(rows, splits.state["columns"]["audio"])
    return replace(task, max_seconds=min(max(1, math.ceil(longest)), _WINDOW))


def _limited(task: Any, *, train: int, evaluated: int) -> Any:
    """Return the settings of a task with limits on its rows, which may have lower ones."""
    data = task.data
    return replace(
        task,
        data=replace(
            data,
            max_train_rows=min(data.max_train_rows or train, train),
            max_eval_rows=min(data.max_eval_rows or evaluated, evaluated),
        ),
    )


def _rows_of_a_batch(task: Any, family: Family, splits: Splits, model: Path) -> int:
    """Return how many rows have room in a batch that is run in a moment, one at least."""
    source = resolve_model(str(model), processor=family.processor)
    processor = family.fit_processor(load_processor(source, family.processor), splits.state)
    bound = family.build(task, splits.state, processor)
    counts = [_count_tokens(bound.encode(row)) for row in splits.rows["train"]]
    return max(1, min(_BATCH, _BATCH_TOKENS * len(counts) // max(1, sum(counts))))


def _count_tokens(value: Any) -> int:
    """Return the tokens of an encoded row, which may be several inputs, or parts of one."""
    if isinstance(value, Mapping):
        ids = value.get("input_ids", ())
        return len(ids) + sum(_count_tokens(item) for item in value.values())
    return sum(_count_tokens(item) for item in value) if isinstance(value, list) else 0


def _short(trainer: TrainerConfig, rows: int) -> TrainerConfig:
    """Return settings for a few steps on batches of a few rows, on what this machine has."""
    has_gpu = torch.cuda.is_available()
    rows, micro = min(trainer.global_batch_size, rows), trainer.micro_batch_size
    return replace(
        trainer,
        max_steps=min(trainer.max_steps or _STEPS, _STEPS),
        global_batch_size=rows,
        micro_batch_size=None if micro is None else _divisor(rows, micro),
        eval_batch_size=min(trainer.eval_batch_size, rows),
        resume="never",
        max_time=None,
        precision="float32" if trainer.precision == "fp16" and not has_gpu else trainer.precision,
        tf32=trainer.tf32 and has_gpu,
    )


def _divisor(rows: int, most: int) -> int:
    """Return the largest divisor of `rows` that is not above `most`.

    >>> _divisor(8, 3), _divisor(8, 100), _divisor(6, 4)
    (2, 8, 3)
    """
    return max(size for size in range(1, rows + 1) if rows % size == 0 and size <= most)


def _small_task(config: TrainConfig, family: Family, folder: Path) -> tuple[Any, list[str]]:
    """Return the settings of the task for a few rows, made-up ones where there are none."""
    task, data = config.task, config.task.data
    if generation := getattr(task, "generation", None):
        most = min(generation.max_new_tokens, _NEW_TOKENS)
        task = replace(task, generation=replace(generation, max_new_tokens=most))
    why = _why_out_of_reach(data.path)
    task = _limited(task, train=_TRAIN_ROWS, evaluated=_EVAL_ROWS)
    if why is None:
        return task, [f"data: at most {_TRAIN_ROWS} rows of {data.path}"]
    rows = family.made_up_rows(task, _TRAIN_ROWS + _EVAL_ROWS)
    made_up = folder / "data"
    made_up.mkdir()
    rows = [_with_files(row, made_up, number) for number, row in enumerate(rows)]
    for split, part in (("train", rows[:_TRAIN_ROWS]), ("validation", rows[_TRAIN_ROWS:])):
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in part]
        (made_up / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    small = replace(
        task.data,
        path=str(made_up),
        name=None,
        revision=None,
        train_split="train",
        validation_split=None,
        test_split=None,
    )
    return replace(task, data=small), [f"data: rows are made up, since {why}"]


def _with_files(row: Mapping[str, Any], folder: Path, number: int) -> dict[str, Any]:
    """Write the bytes of a made-up row into files, and return the row with their names."""
    found = dict(row)
    for name, value in row.items():
        if isinstance(value, bytes):
            found[name] = f"{number}-{name}"
            (folder / found[name]).write_bytes(value)
    return found


def _why_out_of_reach(path: str | None) -> str | None:
    """Return why the rows of a path cannot be read here, or None if they can."""
    if not path:
        return None
    try:
        found = find_path(path)
    except UserError as error:
        return error.problems[0].message
    return None if found is not None else f"{path} is on the hub, which is not asked"


def _write_model(
    config: TrainConfig, family: Family, splits: Splits, folder: Path
) -> tuple[str, bool]:
    """Write a narrow model of the recipe's architecture.

    Returns:
        What it is, in a line, and whether it has the processor of the real model.

    Raises:
        UserError: If the architecture is not known.
    """
    settings, processor = _read_settings(config, family.processor)
    is_read = processor is not None
    if processor is None:
        texts = (
            text for rows in splits.rows.values() for row in rows for text in _texts(row.values)
        )
        processor = make_processor(family.processor, settings, texts)
        if (tokenizer := tokenizer_of(processor)) is not None:
            tokenizer.add_tokens(list(config.lora.trainable_tokens))
    kept = family.auto_class.endswith(_PRETRAINED_HEADS)
    write_tiny_model(
        folder,
        settings,
        processor,
        auto_class=family.auto_class if kept else "AutoModel",
        width=_width(config),
        seed=config.seed,
    )
    layers = getattr(settings.get_text_config(), "num_hidden_layers", None)
    depth = "" if layers is None else f" of {layers} layers"
    text = f"model: a narrow random {settings.model_type}{depth} for"
    kind = family.processor
    more = "" if is_read else f", with a{'n' * (kind[0] in 'aeiou')} {kind} made for these rows"
    return f"{text} {config.model.path}{more}", is_read


def _read_settings(config: TrainConfig, processor: str) -> tuple[Any, Any]:
    """Return the model's own configuration and processor, or usual settings and None.

    What is not on this machine is not fetched, and a GGUF file, which takes long to read, is not
    read where the recipe says what is in it.

    Raises:
        UserError: If nothing is known of the model.
    """
    path, (architecture, layers) = config.model.path or "", _expected(config)
    try:
        source = resolve_config(path, revision=config.model.revision, is_offline=True)
    except UserError as error:
        if architecture is None:
            raise UserError([replace(p, fix=_FIX) for p in error.problems]) from error
        source = None
    if source is not None and (source.gguf is None or architecture is None):
        # In the hub's cache there may be the one and not the other.
        is_whole = source.gguf is not None or has_processor(source.folder, processor)
        return load_config(source), load_processor(source, processor) if is_whole else None
    # Special tokens, and a prefix, take places of a row.
    positions = 2 * getattr(config.task, "max_length", 0)
    return default_config(architecture or "", layers=layers, positions=positions), None


def _expected(config: TrainConfig) -> tuple[str | None, int | None]:
    """Return architecture and number of layers, as the recipe or our name of the model says."""
    if config.model.architecture is not None:
        return config.model.architecture, config.model.num_layers
    for name in group_options("model"):
        values = option_values("model", name)
        if values.get("model.path") == config.model.path:
            return values.get("model.architecture"), values.get("model.num_layers")
    return None, None


def _width(config: TrainConfig) -> int:
    """Return a width that has room for the ranks of the recipe."""
    most = max([config.lora.r, *config.lora.rank_pattern.values()])
    return max(_WIDTH, 1 << (most - 1).bit_length())


def _texts(value: Any) -> Iterator[str]:
    """Yield the texts in a value, however deep."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, Sequence):
        for item in value:
            yield from _texts(item)

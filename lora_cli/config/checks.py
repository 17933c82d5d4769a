"""Rules that concern several settings at once, or whether a setting is there at all."""

import math
import re
from collections.abc import Callable, Collection, Iterator
from typing import Any

from lora_cli.config.commands import PredictConfig, TrainConfig
from lora_cli.config.groups import group_options
from lora_cli.config.schema import flatten, to_plain
from lora_cli.errors import Problem

_RUN_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")


def check_config(command: str, config: Any, user: Collection[str]) -> list[Problem]:
    """Return everything that is wrong with a decoded config.

    Args:
        command: Subcommand.
        config: Its config.
        user: Dotted names of the settings that the user set.
    """
    problems = list(_check_finite(config))
    if isinstance(config, TrainConfig):
        for check in TRAIN_CHECKS:
            problems.extend(check(config, user))
    else:
        problems.extend(_check_subject(command, config))
    if isinstance(config, PredictConfig):
        problems.extend(_check_predict_source(config, user))
    return problems


def _check_finite(config: Any) -> Iterator[Problem]:
    for name, value in flatten(to_plain(config)).items():
        if isinstance(value, float) and not math.isfinite(value):
            yield Problem(
                id="config.bad-value",
                message=f"`{name}` must be a finite number, but is {value}.",
                key=name,
            )


def _contradiction(first: str, second: str, fix: str) -> Problem:
    return Problem(
        id="config.contradiction",
        message=f"`{first}` must be set without `{second}`, but both are set.",
        key=first,
        fix=fix,
    )


def _check_schedule(config: TrainConfig, user: Collection[str]) -> Iterator[Problem]:
    if "scheduler.warmup_ratio" in user and config.scheduler.warmup_steps is not None:
        yield _contradiction(
            "scheduler.warmup_ratio",
            "scheduler.warmup_steps",
            "leave one of the two out, or set scheduler.warmup_steps=null",
        )
    if "trainer.epochs" in user and config.trainer.max_steps is not None:
        yield _contradiction(
            "trainer.epochs",
            "trainer.max_steps",
            "leave one of the two out, or set trainer.max_steps=null",
        )


def _check_targets(config: TrainConfig, _: Collection[str]) -> Iterator[Problem]:
    if not config.lora.targets:
        yield Problem(
            id="config.bad-value",
            message="`lora.targets` must name at least one layer, but is empty.",
            key="lora.targets",
            allowed="auto, all-linear, or a list of names",
            fix="leave it out to take the usual layers",
        )


def _check_batches(config: TrainConfig, user: Collection[str]) -> Iterator[Problem]:
    micro, whole = config.trainer.micro_batch_size, config.trainer.global_batch_size
    if micro is None or whole % micro == 0:
        return
    divisors = [str(size) for size in range(1, whole + 1) if whole % size == 0]
    on_micro = "trainer.micro_batch_size" in user or "trainer.global_batch_size" not in user
    yield Problem(
        id="config.batch-size",
        message="`trainer.micro_batch_size` must divide `trainer.global_batch_size`"
        f" ({whole}), but is {micro}.",
        key="trainer.micro_batch_size" if on_micro else "trainer.global_batch_size",
        allowed=", ".join(divisors) if len(divisors) <= 20 else f"a divisor of {whole}",
        fix="the gradient is the same for every size that divides it",
    )


def _check_run(config: TrainConfig, _: Collection[str]) -> Iterator[Problem]:
    if config.run.dir is not None and config.run.name is not None:
        yield _contradiction("run.dir", "run.name", "run.name=NAME is short for run.dir=runs/NAME")
    name = config.run.name
    if name is not None and (not _RUN_NAME.fullmatch(name) or set(name) == {"."}):
        yield Problem(
            id="config.bad-value",
            message=f'`run.name` must be a plain name, but is "{name}".',
            key="run.name",
            allowed="1 to 64 of the characters A-Z a-z 0-9 . _ -",
            fix="give a path as run.dir=PATH",
        )


def _check_sources(config: TrainConfig, _: Collection[str]) -> Iterator[Problem]:
    if not config.model.path:
        yield Problem(
            id="config.missing",
            message="`model.path` must be given, but is null.",
            key="model.path",
            allowed=f"model={' | '.join(group_options('model'))}",
            fix="choose model=NAME, or give model.path=DIR or model.path=HUB-ID",
        )
    if not config.task.data.path:
        names = [name for name in group_options("task") if name != config.task.family]
        yield Problem(
            id="config.missing",
            message="`task.data.path` must be given, but is null.",
            key="task.data.path",
            allowed=f"task={' | '.join(names)}",
            fix="choose task=NAME, or give task.data.path=FILE, FOLDER or HUB-ID",
        )


def _check_fractions(config: TrainConfig, _: Collection[str]) -> Iterator[Problem]:
    data, total, last = config.task.data, 0.0, ""
    for key in ("validation_split", "test_split"):
        share = getattr(data, key)
        if not isinstance(share, float):
            continue
        name = f"task.data.{key}"
        if not 0 < share < 1:
            yield Problem(
                id="config.bad-value",
                message=f"`{name}` must be a split name or a fraction above 0 and below 1,"
                f" but is {share:g}.",
                key=name,
                fix="0.1 cuts a tenth of train",
            )
        else:
            total, last = total + share, name
    if total >= 1:
        yield Problem(
            id="config.bad-value",
            message="`task.data.validation_split` and `task.data.test_split` must leave rows to"
            f" train on, but take {total:g} of them.",
            key=last,
        )


def _check_subject(command: str, config: Any) -> Iterator[Problem]:
    if not config.from_:
        yield Problem(
            id="config.missing",
            message="`from` must name a run or adapter directory, but is null.",
            key="from",
            fix=f"lora-cli {command} runs/NAME",
        )


def _check_predict_source(config: PredictConfig, user: Collection[str]) -> Iterator[Problem]:
    if config.text is not None and "input" in user:
        yield _contradiction("text", "input", "leave one of the two out")


TRAIN_CHECKS: tuple[Callable[[TrainConfig, Collection[str]], Iterator[Problem]], ...] = (
    _check_sources,
    _check_fractions,
    _check_schedule,
    _check_targets,
    _check_batches,
    _check_run,
)

"""Rules that concern several settings at once, or whether a setting is there at all."""

import math
import re
from collections.abc import Callable, Collection, Iterator
from typing import Any

from lora_cli.config.adapter_checks import LORA_CHECKS, check_start
from lora_cli.config.chat import TalkConfig
from lora_cli.config.commands import (
    COMMANDS,
    EvalConfig,
    PredictConfig,
    StatusConfig,
    TargetsConfig,
    TrainConfig,
)
from lora_cli.config.conversion import check_convert
from lora_cli.config.distributed import check_distributed, check_sharding, check_shares
from lora_cli.config.duration import parse_duration
from lora_cli.config.exporting import ExportConfig
from lora_cli.config.extraction import check_extract
from lora_cli.config.groups import group_options, list_options, option_variant
from lora_cli.config.media import check_zero_shot
from lora_cli.config.merging import MergeConfig, check_rows_to_verify, check_shard_size
from lora_cli.config.portability import check_for
from lora_cli.config.schema import all_keys, flatten, to_plain
from lora_cli.config.task_families import COMPARING
from lora_cli.config.training_checks import (
    check_labels_told,
    check_schedule_free,
    check_text_generation,
)
from lora_cli.errors import Problem

_ROLES = ("task.data.train_split", "task.data.validation_split", "task.data.test_split")
# Settings of sections that commands share, and that a command refuses, with the reason.
REFUSED: dict[str, dict[str, str]] = {
    "eval": dict.fromkeys(_ROLES, "nothing is trained"),
    "merge": dict.fromkeys(_ROLES, "nothing is trained"),
    "export": dict.fromkeys(_ROLES, "nothing is trained"),
    "targets": {
        **{name: "no rows are looked at" for name in all_keys("targets") if name[:5] == "task."},
        **dict.fromkeys(
            ("model.dtype", "model.quantization", "model.sha256", "model.hub_id"),
            "no weights are read",
        ),
    },
}

_RUN_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")


def check_config(command: str, config: Any, user: Collection[str]) -> list[Problem]:
    """Return everything that is wrong with a decoded config.

    Args:
        command: Subcommand.
        config: Its config.
        user: Dotted names of the settings that the user set.
    """
    problems = list(_check_finite(config))
    for check in CHECKS[command]:
        problems.extend(check(config, user))
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


def _check_targets(config: TrainConfig | TargetsConfig, _: Collection[str]) -> Iterator[Problem]:
    if not config.lora.targets and not config.lora.target_parameters:
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
        fix="choose one of these sizes"
        if config.task.family in COMPARING
        else "the gradient is the same for every size that divides it",
    )


def _check_distributed(config: TrainConfig, user: Collection[str]) -> Iterator[Problem]:
    names_run = config.run.dir is not None or config.run.name is not None
    yield from check_distributed(config.distributed, user, names_run=names_run)
    yield from check_shares(config.trainer, config.distributed.world_size)
    if config.distributed.shard_base:
        yield from check_sharding(
            strategy=config.strategy.name,
            quantization=config.model.quantization,
            trainer=config.trainer,
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


def _check_max_time(config: TrainConfig, _: Collection[str]) -> Iterator[Problem]:
    text = config.trainer.max_time
    if text is not None and parse_duration(text) is None:
        yield Problem(
            id="config.bad-value",
            message=f'`trainer.max_time` must be a length of time, but is "{text}".',
            key="trainer.max_time",
            allowed="days, hours, minutes and seconds in this order, or a number of seconds",
            fix="trainer.max_time=1h30m",
        )


def _check_model(config: TrainConfig | TargetsConfig, _: Collection[str]) -> Iterator[Problem]:
    # An adapter to start from names its base model.
    if not config.model.path and getattr(config, "adapter", None) is None:
        yield Problem(
            id="config.missing",
            message="`model.path` must be given, but is null.",
            key="model.path",
            allowed=list_options("model", group_options("model"), like="minilm"),
            fix="choose model=NAME, or give model.path=DIR or model.path=HUB-ID",
        )


def _check_data(config: TrainConfig, _: Collection[str]) -> Iterator[Problem]:
    if not config.task.data.path:
        family = config.task.family
        names = [
            name
            for name in group_options("task")
            if name != family and option_variant("task", name) == family
        ]
        yield Problem(
            id="config.missing",
            message="`task.data.path` must be given, but is null.",
            key="task.data.path",
            allowed=list_options("task", names) or None,
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


def _check_subject(
    config: EvalConfig | PredictConfig | TalkConfig | ExportConfig | StatusConfig,
    _: Collection[str],
) -> Iterator[Problem]:
    if not config.from_:
        command = next(name for name, cls in COMMANDS.items() if isinstance(config, cls))
        yield Problem(
            id="config.missing",
            message="`from` must name a run or adapter directory, but is null.",
            key="from",
            fix=f"lora-cli {command} runs/NAME",
        )


def _check_predict_source(config: PredictConfig, user: Collection[str]) -> Iterator[Problem]:
    if config.text is not None and "input" in user:
        yield _contradiction("text", "input", "leave one of the two out")


def _check_zero_shot(config: EvalConfig | PredictConfig, _: Collection[str]) -> Iterator[Problem]:
    yield from check_zero_shot(config.zero_shot, section="zero_shot")


def _check_merge_sources(config: MergeConfig, _: Collection[str]) -> Iterator[Problem]:
    if config.from_ and config.adapters:
        yield _contradiction("from", "adapters", "write adapters=[DIR,DIR] and nothing else")
    elif not config.from_ and not config.adapters:
        yield Problem(
            id="config.missing",
            message="`from` must name a run or adapter directory, but is null.",
            key="from",
            fix="lora-cli merge runs/NAME, or lora-cli merge adapters=[runs/A,runs/B] output=DIR",
        )
    if "" in config.adapters:
        yield Problem(
            id="config.bad-value",
            message="`adapters` must be a list of paths, but one of them is empty.",
            key="adapters",
        )
    if config.adapters and not config.from_ and config.output is None:
        yield Problem(
            id="config.missing",
            message="`output` must be given with `adapters`, which have no folder in common,"
            " but is null.",
            key="output",
            fix="output=DIR",
        )


def _check_weights(config: MergeConfig, _: Collection[str]) -> Iterator[Problem]:
    wanted, found = len(config.adapters), len(config.weights)
    if wanted and found and wanted != found:
        yield Problem(
            id="config.bad-value",
            message=f"`weights` must have as many numbers as `adapters` has paths ({wanted}),"
            f" but has {found}.",
            key="weights",
            fix="leave it out to weigh each with 1",
        )


def _check_unused(_: TargetsConfig, user: Collection[str]) -> Iterator[Problem]:
    for name, reason in REFUSED["targets"].items():
        if name in user:
            on_task = name.startswith("task.")
            yield Problem(
                id="config.not-read",
                message=f"`{name}` must be left out, since {reason}, but is set.",
                key=name,
                fix="task=NAME picks the head of a task, num_labels=N its size"
                if on_task
                else None,
            )


_Check = Callable[[Any, Collection[str]], Iterator[Problem]]
CHECKS: dict[str, tuple[_Check, ...]] = {
    "train": (
        _check_model,
        _check_data,
        _check_fractions,
        _check_schedule,
        check_schedule_free,
        check_text_generation,
        check_labels_told,
        _check_targets,
        *LORA_CHECKS,
        check_start,
        _check_batches,
        _check_distributed,
        _check_run,
        _check_max_time,
    ),
    "eval": (_check_subject, _check_zero_shot),
    "predict": (_check_subject, _check_predict_source, _check_zero_shot),
    "chat": (_check_subject,),
    "merge": (_check_merge_sources, _check_weights, check_shard_size, check_rows_to_verify),
    "export": (_check_subject,),
    "extract": (check_extract,),
    "status": (_check_subject,),
    "tasks": (),
    "models": (),
    "convert": (check_convert,),
    "targets": (_check_model, _check_unused, _check_targets, *LORA_CHECKS),
    "check": (_check_subject, check_for),
}

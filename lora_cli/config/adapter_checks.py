"""Rules that concern several settings of the adapter at once."""

import re
from collections.abc import Callable, Collection, Iterator

from lora_cli.config.commands import TargetsConfig, TrainConfig
from lora_cli.errors import Problem

_RANGE = re.compile(r"(\d{1,6})-(\d{1,6})")
_TOP = re.compile(r"top-0*[1-9]\d{0,5}")


def _is_block_entry(entry: int | str) -> bool:
    """Tell whether an entry of `lora.layers` is a number, a range such as 8-11, or top-4."""
    if isinstance(entry, int):
        return True
    if match := _RANGE.fullmatch(entry):
        return int(match[1]) <= int(match[2])
    return _TOP.fullmatch(entry) is not None


def _check_layers(config: TrainConfig | TargetsConfig, _: Collection[str]) -> Iterator[Problem]:
    layers = config.lora.layers
    if layers is None:
        return
    bad = [entry for entry in layers if not _is_block_entry(entry)]
    if layers and not bad:
        return
    found = f'has "{bad[0]}"' if bad else "is empty"
    yield Problem(
        id="config.bad-value",
        message=f"`lora.layers` must name blocks by number, but {found}.",
        key="lora.layers",
        allowed='numbers such as 0 or -1 (the last), ranges such as "8-11", and "top-4"',
        fix="lora.layers=[0,8-11], or leave it out to take every block",
    )


def _check_budget(config: TrainConfig | TargetsConfig, user: Collection[str]) -> Iterator[Problem]:
    """Check that AdaLoRA has steps on which to take ranks away, and ranks to take."""
    if config.lora.variant != "adalora":
        return
    adalora, r, final = config.lora.adalora, config.lora.r, "lora.adalora.final_ratio"
    share = adalora.warmup_ratio + adalora.final_ratio
    if share >= 1:
        yield Problem(
            id="config.bad-value",
            message="`lora.adalora.warmup_ratio` and `lora.adalora.final_ratio` must leave steps"
            f" between them, but take {share:g} of all.",
            key=final if final in user else "lora.adalora.warmup_ratio",
            allowed="a sum below 1",
        )
    if adalora.init_r is not None and adalora.init_r < r:
        yield Problem(
            id="config.bad-value",
            message=f"`lora.adalora.init_r` must be at least `lora.r` ({r}), to which ranks fall,"
            f" but is {adalora.init_r}.",
            key="lora.adalora.init_r",
            fix="leave it out to start from 1.5 r",
        )


def _check_fused(config: TrainConfig | TargetsConfig, _: Collection[str]) -> Iterator[Problem]:
    """Refuse what needs the input of a layer, which the update of a fused weight never sees."""
    lora = config.lora
    if not lora.target_parameters:
        return
    found = {
        "lora.dropout": (lora.dropout > 0, f"{lora.dropout:g}"),
        "lora.lora_bias": (lora.lora_bias, "true"),
    }
    for key, (is_set, shown) in found.items():
        if is_set:
            yield Problem(
                id="config.contradiction",
                message=f"`{key}` must be left out with `lora.target_parameters`, whose update is"
                f" added to a weight, but is {shown}.",
                key=key,
                fix=f"leave one of the two out; to adapt layers only, leave out"
                f" {', '.join(lora.target_parameters)}",
            )


def check_start(config: TrainConfig, _: Collection[str]) -> Iterator[Problem]:
    """Refuse to go on with an adapter by a strategy that trains none."""
    strategy = config.strategy.name
    if config.adapter is None or config.adapter_mode == "merge":
        return
    if strategy not in {"lora", "lora_then_full"}:
        yield Problem(
            id="config.contradiction",
            message=f"`adapter` must be merged first with strategy={strategy}, which trains no"
            " low-rank update, but is to be continued.",
            key="adapter",
            fix="add adapter_mode=merge, or choose strategy=lora",
        )


LORA_CHECKS: tuple[
    Callable[[TrainConfig | TargetsConfig, Collection[str]], Iterator[Problem]], ...
] = (_check_layers, _check_budget, _check_fused)

"""What the values of a PEFT config file must be; a file from elsewhere is untrusted data.

Layers are named by plain names, never by regular expressions, which can hang the matcher.
"""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeGuard

from lora_cli.errors import Problem

_NAME = re.compile(r"[A-Za-z0-9_\-]+(\.[A-Za-z0-9_\-]+)*")
_MAX_NAME_LENGTH = 200
_MAX_NUMBER = 1e9
_MAX_SEED = 2**63

# Heads that PEFT trains whole for a kind of task, whether its config names them or not.
TASK_HEADS: dict[str, tuple[str, ...]] = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
    "SEQ_2_SEQ_LM": (),
    "CAUSAL_LM": (),
    "FEATURE_EXTRACTION": (),
}


def check_values(config: Mapping[str, Any], *, where: str) -> list[Problem]:
    """Return the problems of the fields that `config` has; which it may have is checked before."""
    problems = []
    for key, (fits, rule) in _rules(config["peft_type"]).items():
        if key in config and not fits(config[key]):
            problems.append(bad_value(key, config[key], rule, where))
    return problems + _check_targets(config, where) + _check_schedule(config, where)


def bad_value(key: str, value: object, rule: str, where: str) -> Problem:
    """Return the problem of a value that breaks a rule."""
    return Problem(
        id="adapter.bad-value",
        message=f'"{key}" must be {rule}, but is {json.dumps(value)[:80]}.',
        where=where,
    )


Rule = tuple[Callable[[Any], bool], str]


def _rules(method: str) -> dict[str, Rule]:
    """Return for each field what it must be, as a function and in words."""
    count: Rule = (_is_rank, "an integer of at least 1")
    steps: Rule = (lambda value: value == 0 or _is_rank(value), "an integer of at least 0")
    share: Rule = (lambda value: _is_number(value) and 0 < value < 1, "a number in (0, 1)")
    dropout: Rule = (lambda value: _is_number(value) and 0 <= value < 1, "a number in [0, 1)")
    flag: Rule = (lambda value: isinstance(value, bool), "true or false")
    text: Rule = (lambda value: value is None or isinstance(value, str), "null or text")
    names: Rule = (lambda value: value is None or _are_names(value), "null or a list of names")
    own_bias = f"{'vera' if method == 'VERA' else 'lora'}_only"
    biases = ("none", "all", own_bias)
    tasks = ", ".join(TASK_HEADS)
    numbers: dict[str, Rule] = {
        **dict.fromkeys(("r", "init_r", "target_r", "total_step", "deltaT"), count),
        **dict.fromkeys(("tinit", "tfinal"), steps),
        **dict.fromkeys(("beta1", "beta2"), share),
        **dict.fromkeys(("lora_dropout", "vera_dropout"), dropout),
        "lora_alpha": (_is_strength, "a finite number above 0"),
        "orth_reg_weight": (lambda v: _is_number(v) and v >= 0, "a finite number of at least 0"),
        "d_initial": (_is_number, "a finite number"),
        "projection_prng_key": (_is_seed, "an integer from 0 to 2**63 - 1"),
    }
    return numbers | {
        **dict.fromkeys(("use_rslora", "use_dora", "lora_bias"), flag),
        **dict.fromkeys(("base_model_name_or_path", "revision"), text),
        **dict.fromkeys(("exclude_modules", "modules_to_save", "target_parameters"), names),
        "bias": (lambda value: value in biases, f"none, all or {own_bias}"),
        "task_type": (
            lambda value: value is None or (isinstance(value, str) and value in TASK_HEADS),
            f"null or one of {tasks}",
        ),
        "rank_pattern": _MASKS if method == "ADALORA" else _RANKS,
        "alpha_pattern": (
            lambda value: _is_pattern(value, _is_strength),
            "an object of layer names, not regular expressions, and finite numbers above 0",
        ),
        "layers_to_transform": (
            lambda value: value is None or _are_indices(_as_list(value)),
            "null, or one or several layer indices",
        ),
        "layers_pattern": (
            lambda value: value is None or _are_names(_as_list(value)),
            "null, or one or several names",
        ),
        "trainable_token_indices": (
            _are_tokens,
            "null, a list of token numbers, or an object of such lists by layer name",
        ),
    }


def _check_targets(config: Mapping[str, Any], where: str) -> list[Problem]:
    targets = config["target_modules"]
    if isinstance(targets, str) and targets != "all-linear":
        return [
            Problem(
                id="adapter.regex",
                message='"target_modules" must be a list of layer names or "all-linear", but is a '
                f"regular expression: {json.dumps(targets[:80])}.",
                where=where,
                fix="replace it by the list of the layers that it selects.",
            )
        ]
    named = bool(targets or config.get("target_parameters"))
    if isinstance(targets, str) or (named and _are_names(targets or [])):
        return []
    return [bad_value("target_modules", targets, "a list of layer names", where)]


def _check_schedule(config: Mapping[str, Any], where: str) -> list[Problem]:
    """AdaLoRA must have a step to take ranks away in, and masks as long as the first rank."""
    if config["peft_type"] != "ADALORA":
        return []
    steps = [config[key] for key in ("tinit", "tfinal", "total_step")]
    problems = []
    if all(map(_is_number, steps)) and 0 < steps[2] <= steps[0] + steps[1]:
        rule = "below total_step - tfinal, so that a step is left to take ranks away in"
        problems.append(bad_value("tinit", steps[0], rule, where))
    masks = config["rank_pattern"] or {}
    if _MASKS[0](masks) and any(len(mask) != config["init_r"] for mask in masks.values()):
        rule = "lists of init_r entries"
        problems.append(bad_value("rank_pattern", masks, rule, where))
    return problems


def _is_rank(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= _MAX_NUMBER


def _is_seed(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _MAX_SEED


def _is_number(value: object) -> TypeGuard[float]:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return -_MAX_NUMBER <= value <= _MAX_NUMBER


def _is_strength(value: object) -> bool:
    return _is_number(value) and value > 0


def _are_indices(value: object) -> bool:
    return isinstance(value, list) and all(
        isinstance(item, int) and not isinstance(item, bool) and 0 <= item <= _MAX_NUMBER
        for item in value
    )


def _are_names(value: object) -> bool:
    return isinstance(value, list) and all(
        isinstance(name, str) and len(name) <= _MAX_NAME_LENGTH and _NAME.fullmatch(name)
        for name in value
    )


def _as_list(value: Any) -> Any:
    return value if isinstance(value, list) else [value]


def _are_tokens(value: object) -> bool:
    if isinstance(value, dict):
        return _are_names(list(value)) and all(map(_are_indices, value.values()))
    return value is None or _are_indices(value)


def _is_pattern(value: object, fits: Callable[[object], bool]) -> bool:
    if not isinstance(value, dict):
        return value is None
    return _are_names(list(value)) and all(map(fits, value.values()))


def _is_mask(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, bool) for item in value)


_RANKS: Rule = (
    lambda value: _is_pattern(value, _is_rank),
    "an object of layer names, not regular expressions, and integers of at least 1",
)
_MASKS: Rule = (
    lambda value: _is_pattern(value, _is_mask),
    "null, or an object of tensor names and lists of true or false",
)

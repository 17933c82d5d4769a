"""The config file of a PEFT adapter: its fields, and a strict reader.

A file from elsewhere is untrusted data: the set of keys is closed, and layers are named by plain
names, never by regular expressions, which can hang the matcher.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

from lora_cli.errors import Problem, UserError, nearest_name

CONFIG_FILE = "adapter_config.json"
_MAX_CONFIG_BYTES = 1 << 20
_NAME = re.compile(r"[A-Za-z0-9_\-]+(\.[A-Za-z0-9_\-]+)*")
_MAX_NAME_LENGTH = 200
_MAX_NUMBER = 1e9

# Heads that PEFT trains whole for a kind of task, whether its config names them or not.
TASK_HEADS: dict[str, tuple[str, ...]] = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
    "SEQ_2_SEQ_LM": (),
    "CAUSAL_LM": (),
    "FEATURE_EXTRACTION": (),
}

# Fields that carry what we read.
_READ: dict[str, Any] = {
    "base_model_name_or_path": None,
    "exclude_modules": None,
    "init_lora_weights": True,
    "lora_alpha": 8,
    "lora_dropout": 0.0,
    "modules_to_save": None,
    "peft_type": "LORA",
    "r": 8,
    "revision": None,
    "target_modules": None,
    "task_type": None,
}

# Fields that change nothing about the tensors or the forward pass.
_IGNORED: dict[str, Any] = {
    "auto_mapping": None,
    "inference_mode": True,
    "peft_version": "0.21.0",
}

# Fields of methods that are not supported: any other value than PEFT's default is refused.
_DEFAULT_ONLY: dict[str, Any] = {
    "alora_invocation_tokens": None,
    "alpha_pattern": {},
    "arrow_config": None,
    "bias": "none",
    "corda_config": None,
    "ensure_weight_tying": False,
    "eva_config": None,
    "fan_in_fan_out": False,
    "kasa_config": None,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_bias": False,
    "lora_ga_config": None,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "monteclora_config": None,
    "qalora_group_size": 16,
    "rank_pattern": {},
    "target_parameters": None,
    "trainable_token_indices": None,
    "use_bdlora": None,
    "use_dora": False,
    "use_qalora": False,
    "use_rslora": False,
    "velora_config": None,
}

# Named starts that leave the base weights as they are, so that they do not matter after training.
_PLAIN_STARTS = ("gaussian", "orthogonal")


def default_config() -> dict[str, Any]:
    """Return every field that PEFT 0.21 writes for LoRA, at its default in a saved adapter."""
    return _DEFAULT_ONLY | _IGNORED | _READ


def read_config(path: Path) -> dict[str, Any]:
    """Read and check a config file; fields that it leaves out get PEFT's defaults.

    Raises:
        UserError: If the file is missing or no JSON object, has unknown keys or wrong values, or
            uses features that are not supported; every problem is listed.
    """
    config = _read_json(path)
    problems = _check_config(config, where=str(path))
    if problems:
        raise UserError(problems)
    return _READ | config


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MAX_CONFIG_BYTES:
            raise ValueError("is larger than 1 MiB")
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            Problem(
                id="adapter.missing-file",
                message=f"The adapter folder must hold {CONFIG_FILE}, but does not.",
                where=str(path.parent),
                fix="give the folder of a run or of an adapter.",
            )
        ) from None
    except (ValueError, RecursionError) as error:
        raise UserError(
            Problem(
                id="adapter.bad-config",
                message=f"{CONFIG_FILE} must be a JSON file of at most 1 MiB, but reading it "
                f"gave: {error}.",
                where=str(path),
            )
        ) from None
    if not isinstance(config, dict):
        raise UserError(
            Problem(
                id="adapter.bad-config",
                message=f"{CONFIG_FILE} must hold a JSON object, but holds something else.",
                where=str(path),
            )
        )
    return config


def _check_config(config: Mapping[str, Any], *, where: str) -> list[Problem]:
    known = sorted(_READ | _IGNORED | _DEFAULT_ONLY)
    problems = []
    for key in sorted(set(config) - set(known)):
        near = nearest_name(key, known)
        problems.append(
            Problem(
                id="adapter.unknown-key",
                message=f"{CONFIG_FILE} must hold known keys only, but has {json.dumps(key)[:80]}.",
                where=where,
                fix=f'did you mean "{near}"?' if near else "remove the key if it has no effect.",
            )
        )
    for key in sorted(set(config) & set(_DEFAULT_ONLY)):
        if (config[key] or None) != (_DEFAULT_ONLY[key] or None):
            problems.append(_unsupported(key, config[key], _DEFAULT_ONLY[key], where))
    full = _READ | dict(config)
    problems += _check_method(full, where)
    problems += _check_numbers(full, where)
    problems += _check_names(full, where)
    return problems


def _unsupported(key: str, value: object, only: object, where: str) -> Problem:
    return Problem(
        id="adapter.unsupported",
        message=f'"{key}" must be {json.dumps(only)}, since other values are not supported, '
        f"but is {json.dumps(value)[:80]}.",
        where=where,
        allowed=json.dumps(only),
        fix="merge the adapter with the program that made it, and use the merged model.",
    )


def _check_method(config: Mapping[str, Any], where: str) -> list[Problem]:
    problems = []
    if config["peft_type"] != "LORA":
        problems.append(_unsupported("peft_type", config["peft_type"], "LORA", where))
    start = config["init_lora_weights"]
    if not isinstance(start, bool) and start not in _PLAIN_STARTS:
        problems.append(_unsupported("init_lora_weights", start, True, where))
    task_type = config["task_type"]
    if task_type is not None and task_type not in list(TASK_HEADS):
        problems.append(
            _bad_value("task_type", task_type, f"null or one of {', '.join(TASK_HEADS)}", where)
        )
    return problems


def _check_numbers(config: Mapping[str, Any], where: str) -> list[Problem]:
    problems = []
    r, alpha, dropout = config["r"], config["lora_alpha"], config["lora_dropout"]
    if not isinstance(r, int) or isinstance(r, bool) or r < 1:
        problems.append(_bad_value("r", r, "an integer of at least 1", where))
    if not _is_number(alpha) or alpha <= 0:
        problems.append(_bad_value("lora_alpha", alpha, "a finite number above 0", where))
    if not _is_number(dropout) or not 0 <= dropout < 1:
        problems.append(_bad_value("lora_dropout", dropout, "a number in [0, 1)", where))
    return problems


def _check_names(config: Mapping[str, Any], where: str) -> list[Problem]:
    problems = []
    targets = config["target_modules"]
    if isinstance(targets, str) and targets != "all-linear":
        problems.append(
            Problem(
                id="adapter.regex",
                message='"target_modules" must be a list of layer names or "all-linear", but is a '
                f"regular expression: {json.dumps(targets[:80])}.",
                where=where,
                fix="replace it by the list of the layers that it selects.",
            )
        )
    elif not isinstance(targets, str) and (not _are_names(targets) or not targets):
        problems.append(_bad_value("target_modules", targets, "a list of layer names", where))
    for key in ("exclude_modules", "modules_to_save"):
        if config[key] is not None and not _are_names(config[key]):
            problems.append(_bad_value(key, config[key], "null or a list of module names", where))
    for key in ("base_model_name_or_path", "revision"):
        if config[key] is not None and not isinstance(config[key], str):
            problems.append(_bad_value(key, config[key], "null or text", where))
    return problems


def _bad_value(key: str, value: object, rule: str, where: str) -> Problem:
    return Problem(
        id="adapter.bad-value",
        message=f'"{key}" must be {rule}, but is {json.dumps(value)[:80]}.',
        where=where,
    )


def _is_number(value: object) -> TypeGuard[float]:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return -_MAX_NUMBER <= value <= _MAX_NUMBER


def _are_names(value: object) -> bool:
    return isinstance(value, list) and all(
        isinstance(name, str) and len(name) <= _MAX_NAME_LENGTH and _NAME.fullmatch(name)
        for name in value
    )

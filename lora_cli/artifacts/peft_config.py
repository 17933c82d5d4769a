"""The config file of a PEFT adapter, read strictly: the set of keys is closed."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_cli.artifacts.peft_methods import ABSENT, METHODS, Method
from lora_cli.artifacts.peft_values import check_values
from lora_cli.errors import Problem, UserError, nearest_name

CONFIG_FILE = "adapter_config.json"
_MAX_CONFIG_BYTES = 1 << 20
_EXPERTS_SINCE = (0, 19)

# Named starts that leave the base weights as they are, so that they do not matter after training.
_PLAIN_STARTS = ("eva", "gaussian", "orthogonal")


def read_config(path: Path) -> dict[str, Any]:
    """Read and check a config file; fields that it leaves out get PEFT's defaults.

    Raises:
        UserError: If the file is missing or no JSON object, has unknown keys or wrong values, or
            uses features that are not supported; every problem is listed.
    """
    config = read_json(path)
    problems = _check_config(config, where=str(path))
    if problems:
        raise UserError(problems)
    return {**ABSENT, **_method(config).read, **config}


def read_json(path: Path) -> dict[str, Any]:
    """Read a config file, whatever its fields.

    Raises:
        UserError: If it is missing, larger than 1 MiB or no JSON object.
    """
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
    except (OSError, ValueError, RecursionError) as error:
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


def _method(config: Mapping[str, Any]) -> Method:
    return METHODS[config.get("peft_type", "LORA")]


def _check_config(config: Mapping[str, Any], *, where: str) -> list[Problem]:
    name = config.get("peft_type", "LORA")
    if name not in list(METHODS):
        return [_unsupported("peft_type", name, tuple(METHODS), where)]
    method = _method(config)
    known = sorted({**method.read, **method.ignored, **method.default_only})
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
    for key in sorted(set(config) & set(method.default_only)):
        default = method.default_only[key]
        if (config[key] or None) != (default or None):
            problems.append(_unsupported(key, config[key], (default,), where))
    full = {**method.read, **config}
    problems += _check_start(full, where) + _check_layout(full, where)
    return problems + check_values(full, where=where)


def _check_layout(config: Mapping[str, Any], where: str) -> list[Problem]:
    """Refuse updates of fused experts whose factors are those of the transposed matrices."""
    version = re.match(r"(\d+)\.(\d+)", str(config.get("peft_version") or "0.0"))
    numbers = (0, 0) if version is None else (int(version[1]), int(version[2]))
    names = config.get("target_parameters")
    if not isinstance(names, list) or not names or numbers >= _EXPERTS_SINCE:
        return []
    return [
        Problem(
            id="adapter.old-layout",
            message='"peft_version" must be at least 0.19 with "target_parameters", whose tensors '
            f"meant something else before, but is {json.dumps(config.get('peft_version'))[:80]}.",
            where=where,
            fix="merge the adapter with that version of PEFT, and use the merged model.",
        )
    ]


def _check_start(config: Mapping[str, Any], where: str) -> list[Problem]:
    start = config.get("init_lora_weights", True)
    if isinstance(start, bool) or start in list(_PLAIN_STARTS):
        return []
    return [_unsupported("init_lora_weights", start, (True,), where)]


def _unsupported(key: str, value: object, only: tuple[object, ...], where: str) -> Problem:
    allowed = " or ".join(map(json.dumps, only))
    return Problem(
        id="adapter.unsupported",
        message=f'"{key}" must be {allowed}, since other values are not supported, '
        f"but is {json.dumps(value)[:80]}.",
        where=where,
        allowed=allowed,
        fix="merge the adapter with the program that made it, and use the merged model.",
    )

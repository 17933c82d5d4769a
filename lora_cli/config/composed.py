"""A configuration that is ready to run, and the recipe that repeats it."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lora_cli.config.commands import VARIANTS
from lora_cli.config.groups import group_options
from lora_cli.config.paths import absolute_path
from lora_cli.config.quoting import escape_references
from lora_cli.config.reading import UserChoices, unread_settings
from lora_cli.config.schema import all_keys, flatten, nest, select, to_plain, variants_of

_NOT_REPEATED = {"run.dir", "run.name", "trainer.resume"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Composed:
    """The configuration of one job, decoded and checked.

    Attributes:
        command: Subcommand.
        config: The dataclass that the subcommand takes, such as `TrainConfig`.
        plain: The same as nested dicts.
        user: What the user chose, as the content of a recipe; see `recipe_text`.
        choices: The option of each config group, whether chosen or default.
        origins: Where each setting was set, by dotted name; defaults are absent, but for those
            that follow from another choice.
        adjusted: Settings that differ from what was composed, because others decided on them.
        multirun: Whether this is one of several jobs.
        job_number: Position among the jobs, from 0.
    """

    command: str
    config: Any
    plain: Mapping[str, Any]
    user: Mapping[str, Any]
    choices: Mapping[str, str | None]
    origins: Mapping[str, str]
    multirun: bool = False
    job_number: int = 0
    adjusted: Mapping[str, Any] = field(default_factory=dict)


def user_body(
    config: Any,
    *,
    command: str,
    chosen: UserChoices,
    choices: Mapping[str, str | None],
    adjusted: Collection[str],
) -> dict[str, Any]:
    """Return what the user chose as the content of a recipe, with its values resolved.

    Args:
        config: The decoded configuration.
        command: Its subcommand.
        chosen: What the user set.
        choices: The option of each config group.
        adjusted: Settings on which others decided.
    """
    plain: dict[str, Any] = to_plain(config)
    known = all_keys(command)
    leaves: dict[str, Any] = {}
    defaults: list[dict[str, str | None]] = []
    for group, option in choices.items():
        if group not in chosen.groups:
            continue
        if option is None or option in group_options(group):
            defaults.append({group: option})
            continue
        # An option of the user's own --config-dir is written out, to be read without it.
        left_out = {*unread_settings(command, plain), *adjusted}
        if table := variants_of(command).get(group):
            section = getattr(config, group)
            names = [name for name, cls in table.items() if isinstance(section, cls)]
            defaults.append({group: names[0]})
            left_out.add(f"{group}.{VARIANTS[group][0]}")
        written = flatten({group: plain[group]})
        leaves |= {name: value for name, value in written.items() if name not in left_out}
    leaves |= {name: select(plain, name) for name in sorted(chosen.keys) if name in known}
    for name in leaves:
        if known[name].is_path:
            leaves[name] = absolute_path(name, leaves[name], Path.cwd())
    body = nest({name: value for name, value in leaves.items() if name not in _NOT_REPEATED})
    return {"defaults": defaults, **body} if defaults else body


def _guarded(value: Any) -> Any:
    if isinstance(value, str):
        return escape_references(value)
    if isinstance(value, list):
        return [_guarded(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _guarded(item) for key, item in value.items()}
    return value


def recipe_text(composed: Composed) -> str:
    """Write what the user chose as a recipe: training it repeats the run."""
    header = f"# Repeat this run: lora-cli {composed.command} recipe.yaml\n"
    body = yaml.safe_dump(
        _guarded(composed.user), sort_keys=False, allow_unicode=True, default_flow_style=False
    )
    return header + (body if composed.user else "{}\n")

"""Hydra composition; the only module that knows Hydra and OmegaConf.

Everything that leaves this module is plain values: overrides parsed by Hydra's grammar, composed
configurations as nested dicts. `lora_cli.config.launch` decides what to compose.
"""

import contextlib
import copy
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, OverrideType
from hydra.core.override_parser.types import Override as HydraOverride
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from lora_cli.config.commands import COMMANDS, VARIANTS
from lora_cli.config.groups import configs_dir, group_options
from lora_cli.config.overrides import Override
from lora_cli.config.quoting import quote_text
from lora_cli.config.schema import base_node, show, to_plain
from lora_cli.errors import Problem, UserError

_PREFIXES = {
    OverrideType.CHANGE: "",
    OverrideType.ADD: "+",
    OverrideType.FORCE_ADD: "++",
    OverrideType.DEL: "~",
}
_ESCAPED_REFERENCE = re.compile(r"(\\*)\\\$\{")


@dataclass(frozen=True, kw_only=True, slots=True)
class Composition:
    """One composed configuration, not decoded yet.

    Attributes:
        plain: Nested dicts of values, references resolved.
        replaced: Gives the same with other values of some settings, to which references then lead.
        choices: The option of every config group.
        multirun: Whether it is one of several jobs.
        job_number: Its position among them, from 0.
    """

    plain: dict[str, Any]
    replaced: Callable[[Mapping[str, Any]], dict[str, Any]]
    choices: Mapping[str, str | None]
    multirun: bool = False
    job_number: int = 0


def register_bases() -> None:
    """Put the defaults of every command and variant where the YAML files can name them."""
    store = ConfigStore.instance()
    for command in COMMANDS:
        store.store(group="_base", name=command, node=base_node(command))
    for section, (_, table) in VARIANTS.items():
        for name, cls in table.items():
            store.store(group=f"_base/{section}", name=name, node=to_plain(cls()))


def store_config(name: str, node: Mapping[str, Any]) -> None:
    """Keep a primary config in memory."""
    ConfigStore.instance().store(name=name, node=dict(node))


def parse_override(text: str, *, literal: bool, extra: Path | None) -> Override:
    """Read one ``key=value`` with Hydra's grammar.

    Args:
        text: The override.
        literal: Whether the value was quoted by us, and is shown as the user typed it.
        extra: Folder given with `--config-dir`.

    Raises:
        UserError: If it does not follow the grammar.
    """
    try:
        item = OverridesParser.create().parse_override(text)
        values, texts = _sweep(item, text, extra)
    except HydraException as error:
        raise UserError(_bad_grammar(text, error)) from error
    key, typed = item.key_or_group, text
    if literal and len(values) == 1:
        shown = values[0] if isinstance(values[0], str) else show(values[0])
        typed = f"{key}=" + _ESCAPED_REFERENCE.sub(_unescape, shown)
    return Override(
        typed=typed,
        line=text,
        texts=texts,
        key=key,
        values=values,
        is_sweep=item.is_sweep_override(),
        prefix=_PREFIXES[item.type],
        package=item.package,
    )


def _sweep(
    item: HydraOverride, text: str, extra: Path | None
) -> tuple[tuple[Any, ...], tuple[str, ...]]:
    """Return the values of an override, and it written once for each of them."""
    if not item.is_sweep_override():
        return (item.value(),), (text,)
    if isinstance(item._value, Glob):
        names = item._value.filter(list(group_options(item.key_or_group, extra)))
        return tuple(names), tuple(f"{item.key_or_group}={name}" for name in names)
    if not item.is_discrete_sweep():
        return (), ()
    values = tuple(HydraOverride._convert_value(value) for value in item.sweep_iterator())
    key = item.get_key_element()
    return values, tuple(f"{key}={value}" for value in item.sweep_string_iterator())


def _unescape(match: re.Match[str]) -> str:
    return match[1][: len(match[1]) // 2] + "${"


def _bad_grammar(text: str, error: HydraException) -> Problem:
    key, _, value = text.partition("=")
    fix = f"put the value in quotes for Hydra and for the shell: {key}='\"VALUE\"'"
    if value.startswith("{"):
        fix = f"write it as '{key}={{NAME: VALUE, NAME: VALUE}}'; a recipe takes any name"
    reason = str(error).partition("\n")[0].rstrip(".")
    return Problem(
        id="config.bad-override",
        message=f"`{key}` must be set in Hydra's override syntax, but the parser says: {reason}.",
        key=key,
        where=f"command line, {text}",
        fix=fix,
    )


def read_values(text: str) -> dict[str, Any]:
    """Parse a YAML text that has been scanned; references stay as they are written.

    OmegaConf's reader takes ``1e-3`` for a number, which YAML 1.1 as such does not.
    """
    try:
        node = OmegaConf.create(text)
        content = OmegaConf.to_container(node, resolve=False)
    except OmegaConfBaseException as error:
        raise UserError(describe_error(error)) from error
    return {str(key): value for key, value in content.items()} if isinstance(content, dict) else {}


def describe_error(error: Exception) -> Problem:
    """Turn an error of Hydra or OmegaConf into a problem."""
    reason = str(error).strip().partition("\n")[0].rstrip(".")
    return Problem(
        id="config.not-composed",
        message=f"The configuration must compose, but Hydra says: {reason}.",
        key=getattr(error, "full_key", None) or None,
    )


def _composition(node: DictConfig, settings: Any) -> Composition:
    """Describe a composed config that no longer holds Hydra's own settings."""

    def replaced(values: Mapping[str, Any]) -> dict[str, Any]:
        changed = copy.deepcopy(node)
        for name, value in values.items():
            OmegaConf.update(changed, name, value, merge=False, force_add=True)
        return _resolved(changed)

    multirun = settings.mode == RunMode.MULTIRUN
    return Composition(
        plain=_resolved(node),
        replaced=replaced,
        choices=dict(settings.runtime.choices),
        multirun=multirun,
        job_number=int(settings.job.num) if multirun else 0,
    )


def _resolved(node: DictConfig) -> dict[str, Any]:
    try:
        plain = OmegaConf.to_container(node, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(describe_error(error)) from error
    return {str(key): value for key, value in plain.items()} if isinstance(plain, dict) else {}


@contextlib.contextmanager
def composing(
    config_name: str, *, extra: Path | None
) -> Iterator[Callable[[Sequence[str]], Composition]]:
    """Give a function that composes a primary config with overrides, without running anything.

    The function raises UserError if Hydra cannot compose.
    """
    search = [f"hydra.searchpath=[{quote_text(f'file://{extra}')}]"] if extra else []

    def compose(overrides: Sequence[str]) -> Composition:
        try:
            node = hydra.compose(
                config_name, overrides=[*search, *overrides], return_hydra_config=True
            )
        except (HydraException, OmegaConfBaseException) as error:
            raise UserError(describe_error(error)) from error
        settings = node.hydra
        with read_write(node), open_dict(node):
            del node["hydra"]
        return _composition(node, settings)

    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(config_dir=str(configs_dir()), version_base="1.3"):
        yield compose


def call_hydra(
    config_name: str, arguments: Sequence[str], *, job: Callable[[Composition], None]
) -> int:
    """Run `hydra.main`, with its errors raised rather than printed.

    Args:
        config_name: Primary config.
        arguments: Flags and overrides for Hydra.
        job: Called once, or once for each job of a sweep, or not at all if the flags only ask to
            show something.

    Returns:
        The exit code that Hydra asks for.

    Raises:
        UserError: If Hydra refuses the arguments or cannot compose.
    """

    def task(node: DictConfig) -> None:
        job(_composition(node, HydraConfig.get()))

    os.environ["HYDRA_FULL_ERROR"] = "1"
    before = sys.argv
    sys.argv = ["lora-cli", *arguments]
    run = hydra.main(version_base="1.3", config_path=str(configs_dir()), config_name=config_name)
    try:
        run(task)()
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(describe_error(error)) from error
    except SystemExit as ending:
        return ending.code if isinstance(ending.code, int) else int(bool(ending.code))
    finally:
        sys.argv = before
    return 0

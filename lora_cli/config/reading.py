"""Settings that the rest of a configuration does not read: nothing the user wrote is ignored."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lora_cli.config.commands import VARIANTS
from lora_cli.config.groups import option_origins, option_variant
from lora_cli.config.overrides import Request
from lora_cli.config.schema import (
    all_keys,
    default_variant,
    flatten,
    keys_of,
    select,
    show,
    to_plain,
)
from lora_cli.errors import Problem


@dataclass(frozen=True, kw_only=True, slots=True)
class Unread:
    """Why a setting is not read.

    Attributes:
        selector: The other setting that decides so.
        values: Values of the selector with which it is read; none if any that is not empty does.
    """

    selector: str
    values: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class UserChoices:
    """What the user set, as far as it counts.

    Attributes:
        keys: Settings in the recipe and on the command line.
        groups: Config groups for which the user chose an option.
        dropped: Settings of the recipe that gave way to the command line, with their defaults.
    """

    keys: frozenset[str]
    groups: frozenset[str]
    dropped: Mapping[str, Any]


def unread_settings(command: str, plain: Mapping[str, Any]) -> dict[str, Unread]:
    """Return the settings of a decoded configuration that have no effect, and why.

    Args:
        command: Subcommand.
        plain: The configuration as nested dicts.
    """
    found: dict[str, Unread] = {}
    present = flatten(plain)
    for name, key in all_keys(command).items():
        if name not in present:
            continue
        for selector, values in key.only.items():
            chosen = present.get(selector)
            is_read = chosen in values if values else bool(chosen)
            if selector in present and not is_read:
                found.setdefault(name, Unread(selector=selector, values=values))
    return found


def give_way(
    request: Request, plain: Mapping[str, Any], choices: Mapping[str, str | None]
) -> UserChoices:
    """Drop what a recipe sets for a choice that the command line has changed.

    A recipe for LoRA with ``strategy=full`` on the command line trains in full: the settings of
    LoRA in the recipe give way. On the command line itself they would be a mistake. An option of a
    config group gives way as one: with what the rest of it is for goes the learning rate that it
    sets for that.

    Args:
        request: What the user asked for.
        plain: The configuration of one job, which decodes.
        choices: Its option of each config group.
    """
    line = _set_on_line(request, choices)
    keys, groups, on_line = request.user_keys(), request.chosen_groups(), request.line_keys()
    known = keys_of(request.command, plain)
    changed = {
        name
        for name, why in unread_settings(request.command, plain).items()
        if why.selector in line
    }
    dropped = (keys & changed) - on_line
    for group in sorted(groups - request.line_groups()):
        given = set(_given_by_option(request, plain, group, choices))
        purpose = {name for name in given if "times" not in known[name].metadata}
        if not purpose or not purpose <= changed:
            continue
        dropped |= given - (keys - changed) - on_line
        option = choices.get(group)
        if group not in VARIANTS or default_variant(group) == option_variant(
            group, option, request.extra
        ):
            groups.remove(group)
    return UserChoices(
        keys=frozenset(keys - dropped),
        groups=frozenset(groups),
        dropped={name: to_plain(known[name].default) for name in sorted(dropped)},
    )


def _set_on_line(request: Request, choices: Mapping[str, str | None]) -> set[str]:
    """Return the settings that the command line sets, by itself or with a config group."""
    names = request.line_keys()
    for group in request.line_groups():
        names |= set(option_origins(group, choices.get(group), request.extra))
        if group in VARIANTS:
            names.add(f"{group}.{VARIANTS[group][0]}")
    return names


def _given_by_option(
    request: Request, plain: Mapping[str, Any], group: str, choices: Mapping[str, str | None]
) -> Iterator[str]:
    """Yield the settings that an option of a config group takes away from their defaults."""
    known = keys_of(request.command, plain)
    for name in option_origins(group, choices.get(group), request.extra):
        if name in known and select(plain, name) != to_plain(known[name].default):
            yield name


def check_read(
    request: Request,
    plain: Mapping[str, Any],
    *,
    chosen: UserChoices,
    choices: Mapping[str, str | None],
    is_whole: bool = True,
) -> Iterator[Problem]:
    """Report every setting that the user set and that has no effect.

    Args:
        request: What the user asked for.
        plain: The configuration of one job, after `give_way`.
        chosen: What the user set, as far as it counts.
        choices: The option of each config group.
        is_whole: Whether `plain` holds all that was asked for. Where it does not, a setting is only
            reported if the user has chosen what it is not read with.
    """
    stated = _stated(request, chosen, choices)
    by_option = {
        name: f"{group}={choices.get(group)}"
        for group in sorted(chosen.groups)
        for name in _given_by_option(request, plain, group, choices)
    }
    for name, why in unread_settings(request.command, plain).items():
        if (name in chosen.keys or name in by_option) and (is_whole or why.selector in stated):
            origin = None if name in chosen.keys else by_option[name]
            yield _unread_problem(name, why, plain, origin=origin)


def _stated(request: Request, chosen: UserChoices, choices: Mapping[str, str | None]) -> set[str]:
    """Return the settings that the user has chosen, by themselves or with a config group."""
    names = set(chosen.keys)
    for group in chosen.groups:
        names |= set(option_origins(group, choices.get(group), request.extra))
        if group in VARIANTS:
            names.add(f"{group}.{VARIANTS[group][0]}")
    return names


def shown_choice(selector: str, value: Any) -> str:
    """Write a choice as on the command line, that of a config group by its group.

    >>> shown_choice("strategy.name", "full"), shown_choice("lora.variant", "vera")
    ('strategy=full', 'lora.variant=vera')
    """
    section, _, tag = selector.rpartition(".")
    is_group = section in VARIANTS and VARIANTS[section][0] == tag
    return f"{section if is_group else selector}={show(value)}"


def _unread_problem(
    name: str, why: Unread, plain: Mapping[str, Any], *, origin: str | None
) -> Problem:
    found = show(select(plain, name))
    leave = f"leave {origin or name} out"
    if not why.values:
        return Problem(
            id="config.not-read",
            message=f"`{name}` must be left out without `{why.selector}`, which alone gives it a"
            f" meaning, but is {found}.",
            key=name,
            fix=f"{leave}, or give {why.selector}",
        )
    chosen = shown_choice(why.selector, select(plain, why.selector))
    return Problem(
        id="config.not-read",
        message=f"`{name}` must be left out with {chosen}, which has no such setting,"
        f" but is {found}.",
        key=name,
        allowed=f"with {shown_choice(why.selector, ' or '.join(why.values))}",
        fix=f"{leave}, or choose {shown_choice(why.selector, why.values[0])}",
    )

"""Defaults that follow from another choice, such as a learning rate from the strategy."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from lora_cli.config.commands import VARIANTS
from lora_cli.config.reading import shown_choice
from lora_cli.config.schema import Key, keys_of, select

# Choices that bring another choice with them, unless that was made: (setting, value) of both.
_FOLLOWS = {("optimizer.name", "schedule_free"): ("scheduler.name", "constant")}


@dataclass(frozen=True, kw_only=True, slots=True)
class Derived:
    """A default that follows from another choice.

    Attributes:
        value: What the setting is.
        origin: Where it comes from, as errors show it.
    """

    value: float | str
    origin: str


def derived_defaults(
    command: str, plain: Mapping[str, Any], *, given: Collection[str]
) -> dict[str, Derived]:
    """Return the settings whose default another choice has changed.

    Args:
        command: Subcommand.
        plain: A decoded configuration as nested dicts.
        given: Settings that the user, or an option of a config group, has set; of a group that
            the user has chosen an option of, the key that tells which.
    """
    known = keys_of(command, plain)
    found: dict[str, Derived] = {}
    for (selector, choice), (name, value) in _FOLLOWS.items():
        is_chosen = selector in known and select(plain, selector) == choice
        if is_chosen and name not in given and select(plain, name) != value:
            origin = f"default with {shown_choice(selector, choice)}"
            found[name] = Derived(value=value, origin=origin)
    for name, key in known.items():
        # A search plug-in sets what `given` does not know of.
        if name in given or "times" not in key.metadata or select(plain, name) != key.default:
            continue
        selector, factors = key.metadata["times"]
        choice = select(plain, selector)
        if (factor := factors[choice]) == 1:
            continue
        section = name.partition(".")[0]
        tag = f"{section}.{VARIANTS[section][0]}"
        found[name] = Derived(
            # A product such as 0.1 * 0.1 has a long tail of digits.
            value=float(f"{key.default * factor:.6g}"),
            origin=f"default of {shown_choice(tag, select(plain, tag))}"
            f" times {factor:g} for {shown_choice(selector, choice)}",
        )
    return found


def describe_factors(key: Key) -> str:
    """Say what the default of a setting is multiplied by; nothing for most settings."""
    if "times" not in key.metadata:
        return ""
    selector, factors = key.metadata["times"]
    by_factor: dict[float, list[str]] = {}
    for choice, factor in factors.items():
        by_factor.setdefault(factor, []).append(choice)
    ordered = [factor for factor in sorted(by_factor, reverse=True) if factor != 1]
    texts = [f"{'|'.join(by_factor[factor])} {factor:g}" for factor in ordered]
    group = selector.partition(".")[0]
    return f"Unless set, times a factor by {group}: {', '.join(texts)}."

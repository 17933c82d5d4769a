"""`lora-cli models`: the base models that have a name, by the task families that they suit."""

from collections.abc import Iterable
from itertools import groupby
from typing import Any

from lora_cli.commands.catalogue import Entry, select, show_columns
from lora_cli.commands.display import Display
from lora_cli.commands.options import Options
from lora_cli.config.commands import ModelsConfig
from lora_cli.config.composed import Composed
from lora_cli.config.groups import describe_option, group_options, option_values


def run(composed: Composed, options: Options, display: Display) -> int:
    """List the models that were asked for; return the exit code."""
    config: ModelsConfig = composed.config
    entries = [_entry(name, describe_option(path)) for name, path in group_options("model").items()]
    families = suited_families({entry["architecture"] for entry in entries})
    entries = [{**entry, "families": families[entry["architecture"]]} for entry in entries]
    found = select(entries, config.search, what="models")
    if not options.json and not options.quiet:
        # Models of the same families stand together, in the order of the first of each.
        order = list(dict.fromkeys(tuple(entry["families"]) for entry in found))
        found.sort(key=lambda entry: order.index(tuple(entry["families"])))
        for suited, members in groupby(found, key=lambda entry: entry["families"]):
            display.output(f"for {', '.join(suited)}:")
            show_columns(display, [_row(entry) for entry in members], indent=2)
            display.output("")
        display.output("lora-cli train model=NAME task=NAME, or model.path=FOLDER or HUB-ID")
    display.result({"models": [dict(entry) for entry in found]})
    return 0


def suited_families(architectures: Iterable[str]) -> dict[str, list[str]]:
    """Return the task families that transformers has the head for, by architecture.

    An architecture that fills in masked tokens, or reads or hears with an encoder, is no decoder:
    with the head for the next token it would be shown that token, or be half of itself.
    """
    from lora_cli.models.base import architectures_with
    from lora_cli.tasks.table import FAMILIES

    classes = {family.auto_class for family in FAMILIES.values()}
    with_head = {name: frozenset(architectures_with(name)) for name in classes}
    others = ("AutoModelForMaskedLM", "AutoModelForSeq2SeqLM", "AutoModelForSpeechSeq2Seq")
    with_head["AutoModelForCausalLM"] -= frozenset().union(*(with_head[name] for name in others))
    return {
        kind: [name for name, family in FAMILIES.items() if kind in with_head[family.auto_class]]
        for kind in architectures
    }


def _entry(name: str, text: str) -> dict[str, Any]:
    values = option_values("model", name)
    return {
        "name": name,
        "architecture": values["model.architecture"],
        "path": values.get("model.path"),
        "description": text,
    }


def _row(entry: Entry) -> list[str]:
    return [str(entry[key]) for key in ("name", "architecture", "path", "description")]

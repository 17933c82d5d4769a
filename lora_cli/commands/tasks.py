"""`lora-cli tasks`: the tasks that have a name, by family."""

import inspect
from itertools import groupby
from typing import Any

from lora_cli.commands.catalogue import Entry, select, show_columns
from lora_cli.commands.display import Display
from lora_cli.commands.options import Options
from lora_cli.config.commands import TasksConfig
from lora_cli.config.composed import Composed
from lora_cli.config.groups import describe_option, group_options, option_values, option_variant
from lora_cli.config.task_families import TASKS

_COLUMN = "_column"


def run(composed: Composed, options: Options, display: Display) -> int:
    """List the tasks that were asked for; return the exit code."""
    config: TasksConfig = composed.config
    names = group_options("task")
    order = list(TASKS)
    entries = [_entry(name, describe_option(path)) for name, path in names.items()]
    entries.sort(key=lambda entry: order.index(entry["family"]))
    found = select(entries, config.search, what="tasks")
    if not options.json and not options.quiet:
        for family, members in groupby(found, key=lambda entry: str(entry["family"])):
            what = (inspect.getdoc(TASKS[family]) or "").partition("\n")[0]
            display.output(f"{family}: {what}")
            show_columns(display, [_row(entry) for entry in members], indent=2)
            display.output("")
        display.output("lora-cli train model=NAME task=NAME")
    display.result({"tasks": [dict(entry) for entry in found]})
    return 0


def _entry(name: str, text: str) -> dict[str, Any]:
    """Return what there is to say of a task, as JSON values."""
    values, family = option_values("task", name), option_variant("task", name)
    return {
        "name": name,
        "family": family,
        "metric": values.get("task.metric", TASKS[family]().metric),
        "data": values.get("task.data.path"),
        "configuration": values.get("task.data.name"),
        "columns": {
            key.removeprefix("task.data.").removesuffix(_COLUMN): value
            for key, value in values.items()
            if key.endswith(_COLUMN)
        },
        "description": text,
    }


def _row(entry: Entry) -> list[str]:
    data = " ".join(part for part in (entry["data"], entry["configuration"]) if part)
    columns = " ".join(entry["columns"].values())
    return [entry["name"], entry["metric"], data or "-", columns or "-", entry["description"]]

"""`lora-cli models`: the base models that have a name."""

from lora_cli.commands.catalogue import select, show_columns
from lora_cli.commands.display import Display
from lora_cli.commands.options import Options
from lora_cli.config.commands import ModelsConfig
from lora_cli.config.composed import Composed
from lora_cli.config.groups import describe_option, group_options, option_values


def run(composed: Composed, options: Options, display: Display) -> int:
    """List the models that were asked for; return the exit code."""
    config: ModelsConfig = composed.config
    entries = [
        {
            "name": name,
            "path": option_values("model", name).get("model.path"),
            "description": describe_option(path),
        }
        for name, path in group_options("model").items()
    ]
    found = select(entries, config.search, what="models")
    if not options.json and not options.quiet:
        rows = [[str(entry[key]) for key in ("name", "path", "description")] for entry in found]
        show_columns(display, rows)
        display.output("")
        display.output("lora-cli train model=NAME task=NAME, or model.path=FOLDER or HUB-ID")
    display.result({"models": [dict(entry) for entry in found]})
    return 0

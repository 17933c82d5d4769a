"""All settings with type and default, as a file: a change of the surface shows in the diff.

After a change on purpose: SURFACE=write python -m pytest tests/contract/test_cli_surface.py
"""

import os
from pathlib import Path

from lora_cli.cli.argv import ALL_FLAGS
from lora_cli.config.commands import COMMANDS
from lora_cli.config.derived import describe_factors
from lora_cli.config.groups import default_options, group_options
from lora_cli.config.reading import shown_choice
from lora_cli.config.schema import iter_keys, short_type, show, variants_of

SNAPSHOT = Path(__file__).with_name("surface.txt")


def surface() -> str:
    lines = ["flags: " + " ".join(ALL_FLAGS)]
    for command, cls in COMMANDS.items():
        lines.append(f"\n{command}")
        for group, default in default_options(command).items():
            options = " ".join(group_options(group))
            lines.append(f"  group {group} (default {show(default)}): {options}")
        keys = {key.name: key for key in iter_keys(cls)}
        rows = [
            ("", key)
            for name, key in keys.items()
            if name.split(".")[0] not in variants_of(command)
        ]
        for section, table in variants_of(command).items():
            for name, variant in table.items():
                rows += [
                    (f"[{section}={name}] ", key)
                    for key in iter_keys(variant, prefix=f"{section}.")
                ]
        for prefix, key in rows:
            bounds = " ".join(
                f"{name} {value}"
                for name, value in key.metadata.items()
                if name not in {"path", "text", "only", "times"}
            )
            kind = short_type(key.annotation, key.metadata) + (f" ({bounds})" if bounds else "")
            needs = [
                shown_choice(name, "|".join(values)) if values else name
                for name, values in key.only.items()
            ]
            with_ = f" with {' '.join(needs)}" if needs else ""
            times = f" ({describe_factors(key)})" if "times" in key.metadata else ""
            lines.append(f"  {prefix}{key.name}: {kind} = {show(key.default)}{with_}{times}")
    return "\n".join(lines) + "\n"


def test_the_surface_is_as_recorded() -> None:
    if os.environ.get("SURFACE") == "write":
        SNAPSHOT.write_text(surface(), encoding="utf-8")
    assert surface() == SNAPSHOT.read_text(encoding="utf-8")

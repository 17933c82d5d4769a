"""Where each setting was set, for errors and for the record of a run."""

from collections.abc import Mapping
from dataclasses import replace

from lora_cli.config.groups import configs_dir, option_origins
from lora_cli.config.overrides import Request, resets
from lora_cli.config.schema import mapping_settings
from lora_cli.errors import Problem


def _mapping_of(name: str) -> str | None:
    """Return the setting that an entry of a mapping belongs to."""
    return next((key for key in mapping_settings() if name.startswith(f"{key}.")), None)


def user_origins(request: Request) -> dict[str, str]:
    """Return where the user set each setting, the command line winning."""
    origins: dict[str, str] = {}
    if request.recipe is not None:
        shown, lines = request.recipe.shown, request.recipe.lines
        origins |= {
            name: f"{shown}:{line}" for name, line in lines.items() if _mapping_of(name) is None
        }
    return origins | {item.key: item.origin for item in request.overrides}


def all_origins(request: Request, choices: Mapping[str, str | None]) -> dict[str, str]:
    """Return where each setting was set, the last place winning; defaults are absent."""
    origins: dict[str, str] = {}
    for group, option in choices.items():
        for name, path in option_origins(group, option, request.extra).items():
            ours = path.is_relative_to(configs_dir())
            origins[name] = f"configs/{path.relative_to(configs_dir())}" if ours else str(path)
    for name in resets(request):
        origins.pop(name, None)
    return origins | user_origins(request)


def located(problem: Problem, origins: Mapping[str, str]) -> Problem:
    """Say where the setting of a problem was set, unless the problem has a place already."""
    if problem.where is not None or problem.key is None:
        return problem
    return replace(problem, where=origins.get(_mapping_of(problem.key) or problem.key))

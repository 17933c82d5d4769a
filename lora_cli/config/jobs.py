"""From the composed configuration of one job to what its command is given."""

from collections.abc import Mapping
from typing import Any

from lora_cli.config.checks import check_config
from lora_cli.config.commands import COMMANDS, VARIANTS
from lora_cli.config.compose import Composition
from lora_cli.config.composed import Composed, user_body
from lora_cli.config.decode import decode
from lora_cli.config.derived import derived_defaults
from lora_cli.config.origins import all_origins, located
from lora_cli.config.overrides import Request
from lora_cli.config.paths import fix_recorded_paths
from lora_cli.config.reading import check_read, give_way
from lora_cli.config.schema import flatten, nest, to_plain
from lora_cli.errors import Problem, UserError


def decode_job(
    request: Request,
    composition: Composition,
    *,
    only_values: bool = False,
    is_whole: bool = True,
) -> Composed:
    """Decode and check a composed configuration, with what the choices in it decide on.

    Args:
        request: What the user asked for.
        composition: The configuration of one job.
        only_values: Look at types and ranges only.
        is_whole: Whether all of the request is in it; else what is missing is not reported.

    Raises:
        UserError: With everything that is wrong, and where it was set.
    """
    choices = {group: composition.choices.get(group) for group in request.groups}
    origins = all_origins(request, choices)
    config = _decoded(request, composition.plain, origins)
    chosen = give_way(request, to_plain(config), choices)
    origins = {name: place for name, place in origins.items() if name not in chosen.dropped}
    left = nest({**flatten(to_plain(config)), **chosen.dropped})
    tags = {f"{group}.{VARIANTS[group][0]}" for group in chosen.groups & VARIANTS.keys()}
    derived = derived_defaults(request.command, left, given={*origins, *tags})
    origins |= {name: item.origin for name, item in derived.items()}
    adjusted = {**chosen.dropped, **{name: item.value for name, item in derived.items()}}
    if adjusted:
        config = _decoded(request, composition.replaced(adjusted), origins)
    problems: list[Problem] = []
    if is_whole and not only_values:
        problems += check_config(request.command, config, chosen.keys)
    if not only_values:
        problems += check_read(
            request, to_plain(config), chosen=chosen, choices=choices, is_whole=is_whole
        )
    if problems:
        raise UserError([located(problem, origins) for problem in problems])
    return Composed(
        command=request.command,
        config=config,
        plain=to_plain(config),
        user=user_body(
            config,
            command=request.command,
            chosen=chosen,
            choices=choices,
            adjusted=adjusted,
        ),
        choices=choices,
        origins=origins,
        multirun=composition.multirun,
        job_number=composition.job_number,
        adjusted=adjusted,
    )


def _decoded(request: Request, plain: dict[str, Any], origins: Mapping[str, str]) -> Any:
    fix_recorded_paths(plain, request.command)
    config, problems = decode(COMMANDS[request.command], plain)
    if config is None:
        raise UserError([located(problem, origins) for problem in problems])
    return config

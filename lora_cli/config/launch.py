"""From a command line to jobs: what was asked for is checked, composed, decoded and run."""

import itertools
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lora_cli.config.checks import check_config
from lora_cli.config.commands import COMMANDS
from lora_cli.config.compose import (
    Composition,
    call_hydra,
    composing,
    parse_override,
    read_values,
    register_bases,
    store_config,
)
from lora_cli.config.composed import Composed, UserChoices, user_body
from lora_cli.config.decode import decode
from lora_cli.config.groups import configs_dir, default_options, option_origins, read_mapping
from lora_cli.config.overrides import Override, Request, resets, sort_overrides
from lora_cli.config.paths import absolute_path
from lora_cli.config.quoting import escape_references, quote_text
from lora_cli.config.recipe import read_recipe, scan_folder
from lora_cli.config.schema import all_keys, select, show, to_plain
from lora_cli.errors import LoraCliError, Problem, StoppedError, UserError
from lora_cli.log import logger

_INSPECTIONS = {"--cfg", "--info", "--hydra-help"}
_MAX_JOBS_CHECKED = 200

Job = Callable[[Composed], int]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Plan:
    """A request that can be composed.

    Attributes:
        request: What the user asked for.
        config_name: Primary config, on disk or in memory.
        leading: Overrides of ours that go before the user's.
        overrides: The user's, as far as they are sound.
    """

    request: Request
    config_name: str
    leading: list[str]
    overrides: list[Override]


@dataclass(slots=True)
class _Outcome:
    """What the jobs of a run came to."""

    code: int = 0
    errors: list[Exception] = field(default_factory=list)
    stopped: bool = False


def run_command(
    command: str,
    overrides: Sequence[str],
    hydra_flags: Sequence[str],
    *,
    recipe: Path | None,
    job: Job,
) -> int:
    """Compose the configuration of a command and run it, once or once for each job of a sweep.

    Args:
        command: Subcommand.
        overrides: ``key=value`` in Hydra's grammar.
        hydra_flags: Flags for Hydra, by their long names, those with a value followed by it.
        recipe: File with settings and choices, if any.
        job: Runs the command and returns its exit code.

    Returns:
        The largest exit code of the jobs; 0 when the flags only ask to show something.

    Raises:
        UserError: With everything that is wrong with the configuration.
        LoraCliError: What the first failing job raised.
    """
    register_bases()
    flags, folder = _take_folder(hydra_flags)
    if "--shell-completion" in flags:
        return call_hydra(command, [*flags, *overrides], job=lambda _: None)
    request, problems = _read_request(command, overrides, flags, recipe=recipe, folder=folder)
    good, found = sort_overrides(request)
    problems += found
    plan = _Plan(
        request=request,
        config_name=_primary_config(request),
        leading=[f"++{name}={_written(value)}" for name, value in resets(request).items()],
        overrides=good,
    )
    inspects = bool(_INSPECTIONS & set(flags))
    if problems or request.multirun or inspects:
        problems += _check_jobs(plan, only_values=inspects or bool(problems))
    if problems:
        raise UserError(list(dict.fromkeys(problems)))
    outcome = _Outcome()
    search = ["--config-dir", str(folder)] if folder else []
    line = plan.leading + [_forced(item.line, item, request) for item in good]
    code = call_hydra(
        plan.config_name,
        [*flags, *search, *line],
        job=lambda composition: _run_job(request, composition, job=job, outcome=outcome),
    )
    if outcome.errors:
        raise outcome.errors[0]
    return code or outcome.code


def _take_folder(flags: Sequence[str]) -> tuple[list[str], Path | None]:
    rest = list(flags)
    if "--config-dir" not in rest:
        return rest, None
    at = rest.index("--config-dir")
    folder = Path(rest[at + 1])
    del rest[at : at + 2]
    scan_folder(folder)
    return rest, folder.resolve()


def _read_request(
    command: str,
    overrides: Sequence[str],
    flags: Sequence[str],
    *,
    recipe: Path | None,
    folder: Path | None,
) -> tuple[Request, list[Problem]]:
    parsed: list[Override] = []
    problems: list[Problem] = []
    known = all_keys(command)
    for text in overrides:
        key = text.partition("=")[0].removeprefix("++")
        literal = key in known and known[key].is_text
        try:
            parsed.append(parse_override(text, literal=literal, extra=folder))
        except UserError as error:
            problems.extend(error.problems)
    content = None
    if recipe is not None:
        try:
            content = read_recipe(recipe, groups=list(default_options(command)), extra=folder)
        except UserError as error:
            raise UserError([*error.problems, *problems]) from error
    request = Request(
        command=command,
        overrides=parsed,
        multirun="--multirun" in flags or any(item.asks_multirun for item in parsed),
        recipe=content,
        body=_recipe_body(content.text, content.path, command) if content else {},
        extra=folder,
    )
    return request, problems


def _recipe_body(text: str, path: Path, command: str) -> dict[str, Any]:
    """Return the settings in a recipe that has been scanned, its relative paths made absolute."""
    body = read_values(text)
    body.pop("defaults", None)
    paths = {name for name, key in all_keys(command).items() if key.is_path}
    _make_absolute(body, "", paths=paths, folder=path.parent)
    return body


def _fix_recorded_paths(plain: dict[str, Any], command: str) -> None:
    """Make the paths that a run writes down absolute: they must mean the same from any folder."""
    for name, key in all_keys(command).items():
        section, _, last = name.rpartition(".")
        node = select(plain, section) if section else plain
        recorded = key.is_path and name.startswith(("model.", "task."))
        if recorded and isinstance(node, dict) and last in node:
            node[last] = absolute_path(name, node[last], Path.cwd())


def _make_absolute(node: dict[str, Any], prefix: str, *, paths: set[str], folder: Path) -> None:
    for key, value in node.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            _make_absolute(value, f"{name}.", paths=paths, folder=folder)
        elif name in paths and (absolute := absolute_path(name, value, folder)) != value:
            kept = "" if "${" in value else escape_references(absolute)
            node[key] = kept or absolute


def _primary_config(request: Request) -> str:
    """Return the name of the primary config, after storing it when there is a recipe.

    The name cannot be guessed, so that no file can take its place.
    """
    if request.recipe is None:
        return request.command
    ours = read_mapping(configs_dir() / f"{request.command}.yaml")
    named = {name for name, _ in request.recipe.defaults}
    chosen: list[Any] = [
        name if name == "_self_" else {name: option} for name, option in request.recipe.defaults
    ]
    before: list[Any] = []
    after: list[Any] = [] if "_self_" in named else ["_self_"]
    for entry in ours["defaults"]:
        name = next(iter(entry)) if isinstance(entry, dict) else entry
        if name.startswith("override "):
            after.append(entry)
        elif name != "_self_" and name not in named:
            before.append(entry)
    node = {**request.body, "defaults": [*before, *chosen, *after], "hydra": ours["hydra"]}
    name = f"_recipe_{uuid.uuid4().hex}"
    store_config(name, node)
    return name


def _written(value: Any) -> str:
    return quote_text(value) if isinstance(value, str) else show(value)


def _forced(text: str, item: Override, request: Request) -> str:
    """Let an override of a setting pass Hydra's own check of the key: ours was stricter."""
    if item.is_hydra or item.key in request.groups:
        return text
    return "++" + text.removeprefix("++")


def _iter_jobs(plan: _Plan) -> Iterator[list[str]]:
    """Yield the overrides of each job, as Hydra's own sweeper makes them."""
    lists = [[text] for text in plan.leading]
    for item in plan.overrides:
        if item.texts:
            lists.append([_forced(text, item, plan.request) for text in item.texts])
    for texts in itertools.product(*lists):
        yield list(texts)


def _check_jobs(plan: _Plan, *, only_values: bool) -> list[Problem]:
    """Compose, decode and check every job before the first one runs.

    Args:
        plan: What to compose.
        only_values: Look at types and ranges only, since some of the request was left out.
    """
    problems: list[Problem] = []
    folders: list[str] = []
    with composing(plan.config_name, extra=plan.request.extra) as compose:
        for job in itertools.islice(_iter_jobs(plan), _MAX_JOBS_CHECKED):
            try:
                composed = _decode(plan.request, compose(job), only_values=only_values)
            except UserError as error:
                hidden = {"config.not-composed"} if only_values else set[str]()
                problems += [item for item in error.problems if item.id not in hidden]
            else:
                run = composed.plain.get("run", {})
                folders += [run["dir"]] if run.get("dir") else []
    if len(set(folders)) < len(folders):
        problems.append(
            Problem(
                id="config.shared-directory",
                message="`run.dir` must differ between the jobs of a sweep, but is shared.",
                key="run.dir",
                where=_user_origins(plan.request).get("run.dir"),
                fix="give run.name=NAME, to which each job adds its number, or leave both out",
            )
        )
    return problems


def _decode(request: Request, composition: Composition, *, only_values: bool = False) -> Composed:
    choices = {group: composition.choices.get(group) for group in request.groups}
    origins = _origins(request, choices)
    _fix_recorded_paths(composition.plain, request.command)
    config, problems = decode(COMMANDS[request.command], composition.plain)
    chosen = UserChoices(
        groups=frozenset(request.chosen_groups()),
        keys=frozenset(request.user_keys()),
    )
    if config is not None and not only_values:
        problems = check_config(request.command, config, chosen.keys)
    if problems or config is None:
        raise UserError([_located(problem, origins) for problem in problems])
    return Composed(
        command=request.command,
        config=config,
        plain=to_plain(config),
        user=user_body(config, command=request.command, chosen=chosen, choices=choices),
        choices=choices,
        origins=origins,
        multirun=composition.multirun,
        job_number=composition.job_number,
    )


def _user_origins(request: Request) -> dict[str, str]:
    origins: dict[str, str] = {}
    if request.recipe is not None:
        shown, lines = request.recipe.shown, request.recipe.lines
        origins |= {name: f"{shown}:{line}" for name, line in lines.items()}
    return origins | {item.key: item.origin for item in request.overrides}


def _origins(request: Request, choices: Mapping[str, str | None]) -> dict[str, str]:
    """Return where each setting was set, the last place winning."""
    origins: dict[str, str] = {}
    for group, option in choices.items():
        for name, path in option_origins(group, option, request.extra).items():
            ours = path.is_relative_to(configs_dir())
            origins[name] = f"configs/{path.relative_to(configs_dir())}" if ours else str(path)
    for name in resets(request):
        origins.pop(name, None)
    return origins | _user_origins(request)


def _located(problem: Problem, origins: Mapping[str, str]) -> Problem:
    if problem.where is not None or problem.key is None:
        return problem
    return replace(problem, where=origins.get(problem.key))


def _run_job(request: Request, composition: Composition, *, job: Job, outcome: _Outcome) -> None:
    """Run one job; errors are kept aside, because Hydra would print them in its own way."""
    if outcome.stopped:
        return
    try:
        composed = _decode(request, composition)
        try:
            outcome.code = max(outcome.code, job(composed))
        except LoraCliError as error:
            error.problems = tuple(_located(item, composed.origins) for item in error.problems)
            raise
    except Exception as error:  # noqa: BLE001  # raised again once Hydra has returned
        outcome.errors.append(error)
        outcome.stopped = isinstance(error, StoppedError | OSError)
        if composition.multirun:
            logger.error("job %d failed: %s", composition.job_number, error)

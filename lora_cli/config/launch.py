"""From a command line to jobs: what was asked for is checked, composed, decoded and run."""

import itertools
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_cli.config.compose import (
    Composition,
    call_hydra,
    composing,
    parse_override,
    read_values,
    register_bases,
    store_config,
)
from lora_cli.config.composed import Composed
from lora_cli.config.groups import configs_dir, default_options, read_mapping
from lora_cli.config.jobs import decode_job
from lora_cli.config.origins import located, user_origins
from lora_cli.config.overrides import Override, Request, resets, sort_overrides
from lora_cli.config.paths import make_absolute
from lora_cli.config.quoting import quote_text
from lora_cli.config.recipe import read_recipe, scan_folder
from lora_cli.config.schema import all_keys, mapping_settings, nest, show
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
        leading=list(_leading(request, good)),
        overrides=good,
    )
    inspects = bool(_INSPECTIONS & set(flags))
    jobs: list[Composed] = []
    if problems or request.multirun or inspects:
        found, jobs = _check_jobs(plan, only_values=inspects, is_whole=not problems)
        problems += found
    if problems:
        raise UserError(list(dict.fromkeys(problems)))
    outcome = _Outcome()
    search = ["--config-dir", str(folder)] if folder else []
    line = plan.leading + [_forced(item.line, item, request) for item in good]
    if inspects and jobs:
        line += _adjusting(jobs[0])
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
    make_absolute(body, "", paths=paths, folder=path.parent)
    return body


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
    name = f"_recipe_{uuid.uuid4().hex}"
    mappings = sorted(request.recipe_keys() & mapping_settings())
    if mappings:
        # As in `_leading`: room for the mappings of the recipe, which stand in `_self_`.
        store_config(f"{name}_room", nest(dict.fromkeys(mappings)))
        entries = [*before, *chosen, *after]
        entries.insert(entries.index("_self_"), f"{name}_room")
    else:
        entries = [*before, *chosen, *after]
    store_config(name, {**request.body, "defaults": entries, "hydra": ours["hydra"]})
    return name


def _leading(request: Request, overrides: Sequence[Override]) -> Iterator[str]:
    """Yield the overrides of ours that go before the user's.

    Hydra would add the entries of a mapping to those that are there; null before it makes room, so
    that the mapping which the user writes last is the whole mapping. It stands without the `++` of
    `_forced`, since a sweep keeps only the last override of the same spelling.
    """
    for name, value in resets(request).items():
        yield f"++{name}={_written(value)}"
    for item in overrides:
        if item.key in mapping_settings():
            yield f"{item.key}=null"


def _adjusting(composed: Composed) -> Iterator[str]:
    """Yield overrides with which Hydra shows what the job is given."""
    for name, value in composed.adjusted.items():
        if name in mapping_settings():
            yield f"{name}=null"
        yield f"++{name}={_written(value)}"


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


def _check_jobs(
    plan: _Plan, *, only_values: bool, is_whole: bool
) -> tuple[list[Problem], list[Composed]]:
    """Compose, decode and check every job before the first one runs.

    Args:
        plan: What to compose.
        only_values: Look at types and ranges only.
        is_whole: Whether nothing of the request was left out.

    Returns:
        What is wrong, and the jobs of which nothing is.
    """
    problems: list[Problem] = []
    jobs: list[Composed] = []
    with composing(plan.config_name, extra=plan.request.extra) as compose:
        for job in itertools.islice(_iter_jobs(plan), _MAX_JOBS_CHECKED):
            try:
                jobs.append(
                    decode_job(
                        plan.request, compose(job), only_values=only_values, is_whole=is_whole
                    )
                )
            except UserError as error:
                hidden = {"config.not-composed"} if only_values or not is_whole else set[str]()
                problems += [item for item in error.problems if item.id not in hidden]
    runs = [job.plain.get("run", {}) for job in jobs]
    folders = [run["dir"] for run in runs if run.get("dir")]
    if len(set(folders)) < len(folders):
        problems.append(
            Problem(
                id="config.shared-directory",
                message="`run.dir` must differ between the jobs of a sweep, but is shared.",
                key="run.dir",
                where=user_origins(plan.request).get("run.dir"),
                fix="give run.name=NAME, to which each job adds its number, or leave both out",
            )
        )
    return problems, jobs


def _run_job(request: Request, composition: Composition, *, job: Job, outcome: _Outcome) -> None:
    """Run one job; errors are kept aside, because Hydra would print them in its own way."""
    if outcome.stopped:
        return
    try:
        composed = decode_job(request, composition)
        try:
            outcome.code = max(outcome.code, job(composed))
        except LoraCliError as error:
            error.problems = tuple(located(item, composed.origins) for item in error.problems)
            raise
    except Exception as error:  # noqa: BLE001  # raised again once Hydra has returned
        outcome.errors.append(error)
        outcome.stopped = isinstance(error, StoppedError | OSError)
        if composition.multirun:
            logger.error("job %d failed: %s", composition.job_number, error)

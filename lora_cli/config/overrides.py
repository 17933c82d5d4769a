"""What the user asked for, checked against the keys and options there are, before composition."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from lora_cli.config.commands import COMMANDS, VARIANTS
from lora_cli.config.decode import unknown_key
from lora_cli.config.groups import (
    default_options,
    group_names,
    group_options,
    option_origins,
    option_variant,
)
from lora_cli.config.recipe import Recipe, unknown_option
from lora_cli.config.schema import (
    Key,
    all_keys,
    flatten,
    iter_keys,
    mapping_settings,
    show,
    variants_of,
)
from lora_cli.config.tasks import DataConfig
from lora_cli.errors import Problem, nearest_name

# What a named model or task says about its own path, and what does not hold for another one.
_RESET_BY_PATH = {
    "model.path": (
        *("model.revision", "model.sha256", "model.hub_id"),
        *("model.architecture", "model.num_layers"),
    ),
    "task.data.path": tuple(
        f"task.data.{item.name}"
        for item in fields(DataConfig)
        if item.name not in ("path", "max_train_rows", "max_eval_rows")
    ),
}

# Two ways to say one thing: the command line's way takes the place of the recipe's.
_ALTERNATIVES = {
    "trainer.epochs": "trainer.max_steps",
    "trainer.max_steps": "trainer.epochs",
    "scheduler.warmup_ratio": "scheduler.warmup_steps",
    "scheduler.warmup_steps": "scheduler.warmup_ratio",
    "run.dir": "run.name",
    "run.name": "run.dir",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Override:
    """One ``key=value`` of the command line, parsed.

    Attributes:
        typed: As the user typed it.
        line: The same in Hydra's grammar.
        texts: In Hydra's grammar for each job; empty where a search plug-in picks the values.
        key: The setting or config group.
        values: Its value, or those of a sweep that can be listed.
        is_sweep: Whether it has several values, or a range that cannot be listed.
        prefix: ``+``, ``++``, ``~`` or nothing.
        package: What follows an ``@`` in the key.
    """

    typed: str
    line: str
    texts: tuple[str, ...]
    key: str
    values: tuple[Any, ...]
    is_sweep: bool
    prefix: str = ""
    package: str | None = None

    @property
    def is_hydra(self) -> bool:
        """Whether it is about Hydra itself; the person at the terminal may do that."""
        return self.key.startswith(("hydra.", "hydra/"))

    @property
    def asks_multirun(self) -> bool:
        """Whether it asks Hydra for several jobs, as `-m` does."""
        return self.key == "hydra.mode" and str(self.values[0]).upper() == "MULTIRUN"

    @property
    def origin(self) -> str:
        """Where a setting came from, as errors show it."""
        return f"command line, {self.typed}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """Everything that the user asked for.

    Attributes:
        command: Subcommand.
        overrides: The command line.
        multirun: Whether sweeps are allowed.
        recipe: The recipe, if one was given.
        body: Settings in the recipe, nested.
        extra: Folder given with `--config-dir`.
    """

    command: str
    overrides: Sequence[Override]
    multirun: bool
    recipe: Recipe | None
    body: Mapping[str, Any]
    extra: Path | None

    @property
    def groups(self) -> dict[str, str | None]:
        """The config groups of the command with their defaults."""
        return default_options(self.command)

    def line_keys(self) -> set[str]:
        """Return the settings on the command line."""
        return {item.key for item in self.overrides if item.key not in self.groups}

    def line_groups(self) -> set[str]:
        """Return the config groups on the command line."""
        return {item.key for item in self.overrides if item.key in self.groups}

    def recipe_keys(self) -> set[str]:
        """Return the settings in the body of the recipe."""
        return set(flatten(self.body))

    def superseded_keys(self) -> set[str]:
        """Return settings of the recipe whose alternative the command line sets."""
        set_on_line: set[str] = set()
        for item in self.overrides:
            if item.key in self.groups:
                for option in item.values:
                    set_on_line |= set(option_origins(item.key, option, self.extra))
            elif item.values != (None,):
                set_on_line.add(item.key)
        return {
            key
            for key in self.recipe_keys() - self.line_keys()
            if _ALTERNATIVES.get(key) in set_on_line
        }

    def user_keys(self) -> set[str]:
        """Return the settings that the user set and that count."""
        return (self.recipe_keys() - self.superseded_keys()) | self.line_keys()

    def chosen_groups(self) -> set[str]:
        """Return the config groups for which the user chose an option."""
        in_recipe = {name for name, _ in self.recipe.defaults} if self.recipe else set()
        return (in_recipe | self.line_groups()) - {"_self_"}

    def options(self, group: str) -> list[str | None]:
        """Return the options of a group that jobs will use, as far as they can be listed."""
        for item in self.overrides:
            if item.key == group:
                return list(item.values)
        for name, option in self.recipe.defaults if self.recipe else ():
            if name == group:
                return [option]
        return [self.groups[group]]

    def variants(self, section: str) -> list[str]:
        """Return the variants that jobs will use in a section."""
        names = [option_variant(section, option, self.extra) for option in self.options(section)]
        return list(dict.fromkeys(names))


def known_keys(request: Request) -> dict[str, Key]:
    """Return the settings that exist in the variants that the request chooses."""
    keys = {key.name: key for key in iter_keys(COMMANDS[request.command])}
    for section, table in variants_of(request.command).items():
        keys = {name: key for name, key in keys.items() if not name.startswith(f"{section}.")}
        for name in request.variants(section):
            if name in table:
                keys |= {key.name: key for key in iter_keys(table[name], prefix=f"{section}.")}
    return keys


def sort_overrides(request: Request) -> tuple[list[Override], list[Problem]]:
    """Return the overrides that can be composed, and what is wrong with the others."""
    good: list[Override] = []
    problems: list[Problem] = []
    known, seen = known_keys(request), set[str]()
    for item in request.overrides:
        found = list(_check_override(item, request, known))
        if item.key in seen and not item.is_hydra:
            found.append(_repeated(item, request.overrides))
        seen.add(item.key)
        problems.extend(found)
        if not found:
            good.append(item)
    misplaced = list(_check_variant_keys(request))
    keys = {problem.key for problem in misplaced}
    return [item for item in good if item.key not in keys], problems + misplaced


def _repeated(item: Override, overrides: Sequence[Override]) -> Problem:
    typed = [other.typed for other in overrides if other.key == item.key]
    return Problem(
        id="config.repeated",
        message=f"`{item.key}` must be given once, but is given {len(typed)} times.",
        key=item.key,
        where=f"command line, {' '.join(typed)}",
    )


def _check_override(
    item: Override, request: Request, known: Mapping[str, Key]
) -> Iterator[Problem]:
    if item.is_hydra:
        return
    if item.prefix in {"+", "~"} or item.package is not None:
        yield Problem(
            id="config.bad-override",
            message=f"`{item.key}` must be set as key=value, but is written"
            f' "{item.typed.partition("=")[0]}".',
            key=item.key,
            where=item.origin,
            fix=f"{item.key}={'null' if item.prefix == '~' else 'VALUE'}",
        )
    elif item.is_sweep and not request.multirun:
        yield Problem(
            id="config.sweep",
            message=f"`{item.key}` must have one value, but has several.",
            key=item.key,
            where=item.origin,
            fix=f"add -m to run one job for each, or write a list as {item.key}=[a,b]",
        )
    elif item.key in request.groups:
        yield from _check_group(item, request)
    elif item.key not in known:
        yield _unknown(item, request, known)


def _check_group(item: Override, request: Request) -> Iterator[Problem]:
    options = list(group_options(item.key, request.extra))
    for value in item.values:
        if not isinstance(value, str) or value not in options:
            shown = "null" if value is None else str(value)
            yield unknown_option(item.key, shown, options, where=item.origin)


def _unknown(item: Override, request: Request, known: Mapping[str, Key]) -> Problem:
    section, _, _ = item.key.rpartition(".")
    sections = {name.rpartition(".")[0] for name in known}
    inside = [name for name in known if name.startswith(f"{item.key}.")]
    mapping = next((name for name in mapping_settings() if item.key.startswith(f"{name}.")), None)
    if mapping in known:
        entry = item.key.removeprefix(f"{mapping}.")
        problem = Problem(
            id="config.bad-value",
            message=f"`{mapping}` must be set as a whole, but `{item.key}` is set by itself.",
            key=item.key,
            fix=f"'{mapping}={{{entry}: {show(item.values[0] if item.values else 'VALUE')}}}'",
        )
    elif inside:
        problem = Problem(
            id="config.bad-value",
            message=f"`{item.key}` must be set one setting at a time, but is set as a whole.",
            key=item.key,
            allowed=", ".join(inside),
        )
    elif item.key in group_names():
        problem = Problem(
            id="config.unknown-key",
            message=f"`{item.key}` must be a setting of `{request.command}`, but is not one.",
            key=item.key,
            allowed=", ".join(known),
            fix="the adapter remembers model, task and lora of its training"
            if "from" in known
            else None,
        )
    else:
        near = [name for name in known if name.rpartition(".")[0] == section]
        tops = [name for name in known if "." not in name] + sorted(sections - {""})
        problem = unknown_key(item.key, near if section in sections and section else tops)
        best = nearest_name(item.key, known)
        if best and section and section not in sections:
            problem = replace(problem, fix=f'did you mean "{best}"?')
        elif best and problem.fix is None:
            problem = unknown_key(item.key, [best])
    return Problem(
        id=problem.id,
        message=problem.message,
        key=problem.key,
        where=item.origin,
        allowed=problem.allowed,
        fix=problem.fix,
    )


def _check_variant_keys(request: Request) -> Iterator[Problem]:
    """Refuse a variant's name that is set by itself: its settings come with the config group."""
    settings: list[tuple[str, list[Any], str | None]] = [
        (name, [value], None) for name, value in flatten(request.body).items()
    ]
    settings += [(item.key, list(item.values), item.origin) for item in request.overrides]
    for section in variants_of(request.command):
        tag, table = f"{section}.{VARIANTS[section][0]}", VARIANTS[section][1]
        for name, values, origin in settings:
            if name == tag and values != request.variants(section):
                yield Problem(
                    id="config.bad-value",
                    message=f"`{tag}` must be chosen with its config group, but is set by itself.",
                    key=tag,
                    where=origin,
                    allowed=", ".join(table),
                    fix=f"{section}={values[0]}, or `- {section}: {values[0]}` in `defaults`",
                )


def resets(request: Request) -> dict[str, Any]:
    """Return settings that do not hold any more, with their defaults.

    Giving `task.data.path` keeps family, metric and lengths of a named task; names of columns,
    labels and splits go back to automatic unless the user sets them too. Giving `model.path` takes
    back what identifies the named weights. What the command line says in another way than the
    recipe takes the recipe's way back.
    """
    if request.command != "train":
        return {}
    keys, known = request.user_keys(), all_keys(request.command) | known_keys(request)
    gone = request.superseded_keys()
    for path, names in _RESET_BY_PATH.items():
        if path in keys:
            gone |= set(names) - keys
    return {name: known[name].default for name in sorted(gone)}

"""The command line taken apart: command, subject, settings, our flags, Hydra's flags."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

from lora_cli.commands.options import Options
from lora_cli.config.commands import COMMANDS
from lora_cli.config.groups import default_options, group_options
from lora_cli.config.quoting import quote_keys, quote_list, quote_text, repeated_key
from lora_cli.config.recipe import find_recipe
from lora_cli.config.schema import Key, all_keys
from lora_cli.errors import Problem, UserError, nearest_name

OUR_FLAGS = {f"--{option.name}": option.name for option in fields(Options)}
SHORT_FLAGS = {
    "-h": "--help",
    "-m": "--multirun",
    "-c": "--cfg",
    "-p": "--package",
    "-i": "--info",
    "-cd": "--config-dir",
    "-cn": "--config-name",
    "-sc": "--shell-completion",
}
# Flags of Hydra, with the values that they take: all of them, a list, or none.
ANY_VALUE = ("",)
HYDRA_FLAGS: dict[str, tuple[str, ...]] = {
    "--cfg": ("job", "hydra", "all"),
    "--info": ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath"),
    "--package": ANY_VALUE,
    "--config-dir": ANY_VALUE,
    "--config-name": ANY_VALUE,
    "--shell-completion": ANY_VALUE,
    "--multirun": (),
    "--resolve": (),
    "--hydra-help": (),
}
# Flags that only some commands read.
COMMANDS_OF_FLAG: dict[str, tuple[str, ...]] = {
    "--resume": ("train",),
    "--overwrite": ("train", "eval", "predict", "merge", "export", "extract", "convert"),
    "--config-name": ("train",),
}
# Settings that a subject sets; a command has one of them at most.
_SUBJECT_KEYS = ("from", "search")
ALL_FLAGS = ["--help", "--version", *OUR_FLAGS, *HYDRA_FLAGS]


@dataclass(frozen=True, kw_only=True, slots=True)
class Invocation:
    """A command line, taken apart.

    Attributes:
        command: Subcommand; None for `lora-cli` alone.
        options: Our flags.
        overrides: Settings, in Hydra's grammar.
        hydra_flags: Flags for Hydra by their long names, each followed by its value if it has one.
        recipe: File given as the subject of `train`.
        wants: "help", "version" or "completion" when that is asked for instead of running.
    """

    command: str | None = None
    options: Options = field(default_factory=Options)
    overrides: tuple[str, ...] = ()
    hydra_flags: tuple[str, ...] = ()
    recipe: Path | None = None
    wants: str | None = None


def split(arguments: Sequence[str]) -> Invocation:
    """Take a command line apart.

    Raises:
        UserError: If there is an unknown command or flag, or a second subject.
    """
    words, flags = _separate(arguments)
    names = {name for name, _ in flags}
    options = Options(**{attribute: flag in names for flag, attribute in OUR_FLAGS.items()})
    if "--version" in names:
        return Invocation(options=options, wants="version")
    if "--shell-completion" in names:
        values = tuple(value for name, value in flags if name == "--shell-completion")
        return Invocation(options=options, overrides=values, wants="completion")
    command = words[0] if words else None
    if command is None:
        return Invocation(options=options, wants="help")
    if command not in COMMANDS:
        raise UserError(_unknown("command", "cli.unknown-command", command, list(COMMANDS)))
    if "--help" in names:
        return Invocation(command=command, options=options, wants="help")
    _check_flags(command, names)
    settings, subjects = _sort_words(command, words[1:])
    recipe = None
    if command == "train":
        recipe = _recipe(subjects, dict(flags))
    elif subjects:
        key = next((name for name in _SUBJECT_KEYS if name in all_keys(command)), None)
        if key is None:
            raise UserError(_needless_subject(command, subjects[0]))
        settings += [f"{key}={quote_text(subject)}" for subject in subjects]
    return Invocation(
        command=command,
        options=options,
        overrides=tuple(settings),
        hydra_flags=tuple(_for_hydra(flags)),
        recipe=recipe,
    )


def _check_flags(command: str, names: Collection[str]) -> None:
    """Refuse flags that would do nothing: of other commands, or beside each other."""
    for name, commands in COMMANDS_OF_FLAG.items():
        if name in names and command not in commands:
            raise UserError(
                Problem(
                    id="cli.needless-flag",
                    message=f"`{name}` must be left out of `lora-cli {command}`, which has no use"
                    " for it, but is given.",
                    where="command line",
                    allowed=f"with {', '.join(commands)}",
                )
            )
    together = [name for name in ("--cfg", "--info", "--multirun") if name in names]
    if len(together) > 1:
        raise UserError(
            Problem(
                id="cli.bad-flag",
                message=f"`{together[0]}` must stand without `{together[1]}`, but both are given.",
                where="command line",
                fix="--cfg and --info show one job: give each setting one value",
            )
        )
    for name in ("--package", "--resolve"):
        if name in names and "--cfg" not in names:
            raise UserError(
                Problem(
                    id="cli.bad-flag",
                    message=f"`{name}` must stand with `--cfg`, which it is about, but does not.",
                    where="command line",
                    fix="add --cfg job",
                )
            )


def _needless_subject(command: str, subject: str) -> Problem:
    key = "model" if subject in group_options("model") else "model.path"
    return Problem(
        id="cli.needless-subject",
        message=f'`{command}` must be given settings only, but is given "{subject}".',
        where="command line",
        allowed="key=value",
        fix=f"lora-cli {command} {key}={subject}",
    )


def _unknown(kind: str, problem: str, name: str, names: list[str]) -> Problem:
    near = nearest_name(name, names)
    return Problem(
        id=problem,
        message=f'The {kind} must be one that exists, but is "{name}".',
        where="command line",
        allowed=", ".join(names),
        fix=f'did you mean "{near}"?' if near else "lora-cli --help",
    )


def _separate(arguments: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Return the words that are no flags, and the flags by long name, each with its value."""
    words: list[str] = []
    flags: list[tuple[str, str]] = []
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if not word.startswith("-") or word == "-":
            words.append(word)
            continue
        name, equals, value = word.partition("=")
        name = SHORT_FLAGS.get(name, name)
        if name not in ALL_FLAGS:
            raise UserError(_unknown("flag", "cli.unknown-flag", word, ALL_FLAGS))
        values = HYDRA_FLAGS.get(name, ())
        if not equals and values and rest and (name != "--info" or rest[0] in values):
            value = rest.pop(0)
        elif name == "--info" and not value:
            value = "all"
        _check_flag_value(name, value, values)
        flags.append((name, value))
    return words, flags


def _check_flag_value(name: str, value: str, values: tuple[str, ...]) -> None:
    if (values == ANY_VALUE and value) or value in values or (not values and not value):
        return
    choices = ", ".join(values)
    wanted = f"one of {choices}" if choices else "a value" if values else "no value"
    found = f'"{value}"' if value else "none"
    raise UserError(
        Problem(
            id="cli.bad-flag",
            message=f"`{name}` must have {wanted}, but has {found}.",
            where="command line",
            allowed=choices or None,
        )
    )


def _sort_words(command: str, words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return settings, their texts quoted for Hydra, and what is left: subjects."""
    known = all_keys(command)
    settings: list[str] = []
    subjects: list[str] = []
    for word in words:
        key, equals, value = word.partition("=")
        plain = key.lstrip("+")
        names_setting = plain in known or plain in default_options(command)
        if not names_setting and Path(word).exists():
            subjects.append(word)
        elif plain in known and equals and value != "null":
            settings.append(f"{key}={_quoted(known[plain], value)}")
        elif equals or word.startswith(("+", "~")):
            settings.append(word)
        else:
            subjects.append(word)
    if len(subjects) > 1:
        listed = '", "'.join(subjects)
        raise UserError(
            Problem(
                id="cli.second-subject",
                message=f'The command line must have one subject, but has "{listed}".',
                where="command line",
                fix="settings are written key=value; put values with spaces in quotes",
            )
        )
    return settings, subjects


def _quoted(key: Key, value: str) -> str:
    """Write a value of the command line in Hydra's grammar, where it is not in it by rule."""
    if key.is_text:
        return quote_list(value) if key.is_list else quote_text(value)
    if not key.is_mapping:
        return value
    if name := repeated_key(value):
        raise UserError(
            Problem(
                id="config.repeated",
                message=f'`{key.name}` must have each name once, but has "{name}" again.',
                key=key.name,
                where=f"command line, {key.name}={value}",
            )
        )
    return quote_keys(value)


def _recipe(subjects: Sequence[str], flags: dict[str, str]) -> Path | None:
    name, folder = flags.get("--config-name"), flags.get("--config-dir")
    if name is None:
        return find_recipe(subjects[0]) if subjects else None
    if folder is None or subjects:
        raise UserError(
            Problem(
                id="cli.bad-flag",
                message="`--config-name` must name a recipe of `--config-dir` and stand without"
                " another recipe, but does not.",
                where="command line",
                fix="lora-cli train RECIPE.yaml",
            )
        )
    return Path(folder, f"{name.removesuffix('.yaml')}.yaml")


def _for_hydra(flags: Sequence[tuple[str, str]]) -> Iterator[str]:
    for name, value in flags:
        if name in HYDRA_FLAGS and name != "--config-name":
            yield name
            if value:
                yield value

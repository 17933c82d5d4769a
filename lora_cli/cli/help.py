"""The texts of `--help`, made from the dataclasses and the config files themselves."""

import inspect
import textwrap
from collections.abc import Iterable, Iterator, Sequence

from lora_cli.cli.argv import COMMANDS_OF_FLAG
from lora_cli.config.checks import REFUSED
from lora_cli.config.commands import COMMANDS, VARIANTS
from lora_cli.config.derived import describe_factors
from lora_cli.config.groups import default_options, describe_option, group_options
from lora_cli.config.reading import shown_choice
from lora_cli.config.recipe import shipped_recipes
from lora_cli.config.schema import Key, all_keys, iter_keys, short_type, show, variants_of

EXAMPLES = {
    "train": (
        "lora-cli train recipes/movie-reviews-minilm.yaml",
        "lora-cli train model=bert task=sst2 lora.r=16",
        "lora-cli train model=minilm task.data.path=reviews.csv trainer.epochs=3",
        "lora-cli train -m recipes/movie-reviews-minilm.yaml lora.r=4,8,16",
        "lora-cli train model=bert task=sst2 'lora.rank_pattern={query: 16, \"*.layer.0.*\": 4}'",
    ),
    "eval": (
        "lora-cli eval runs/NAME",
        "lora-cli eval runs/NAME split=validation --json",
        "lora-cli eval runs/NAME task.data.path=other.jsonl",
    ),
    "predict": (
        'lora-cli predict runs/NAME text="A warm, funny film."',
        "lora-cli predict runs/NAME input=new.csv output=out.jsonl",
        "cat new.jsonl | lora-cli predict runs/NAME > out.jsonl",
    ),
    "chat": (
        "lora-cli chat runs/NAME",
        'lora-cli chat runs/NAME system="Answer in one word." generation.do_sample=true',
        "cat questions.txt | lora-cli chat runs/NAME > answers.txt",
    ),
    "merge": (
        "lora-cli merge runs/NAME",
        "lora-cli merge runs/NAME output=merged/",
        "lora-cli merge 'adapters=[runs/A,runs/B]' 'weights=[0.7,0.3]' output=merged/",
    ),
    "export": (
        "lora-cli export runs/NAME format=onnx output=model.onnx",
        "lora-cli export runs/NAME format=peft output=adapter/",
        "lora-cli export runs/NAME format=gguf gguf_type=q8_0 output=model.gguf",
    ),
    "extract": ("lora-cli extract base=DIR tuned=DIR lora.r=16 output=adapter/",),
    "targets": (
        "lora-cli targets model=bert",
        "lora-cli targets model=bert lora=all-linear lora.layers=top-4 --json",
    ),
    "status": (
        "lora-cli status runs/NAME",
        "lora-cli status runs/NAME watch=true",
        "lora-cli status runs/ --json",
    ),
    "tasks": ("lora-cli tasks", "lora-cli tasks chinese", 'lora-cli tasks "token f1" --json'),
    "models": ("lora-cli models", "lora-cli models chinese"),
    "check": (
        "lora-cli check runs/NAME",
        "lora-cli check adapter/ for=[vllm,llama.cpp] base=DIR --json",
    ),
    "convert": (
        "lora-cli convert adapter=DIR base=DIR output=adapter/",
        "lora-cli convert adapter=runs/NAME r=4 output=smaller/",
    ),
}

FLAGS = (
    ("--help, -h", "this text"),
    ("--json", "result as one JSON object on stdout; messages go to stderr"),
    ("--quiet", "warnings and errors only"),
    ("--debug", "show tracebacks"),
    ("--resume", "continue an unfinished run"),
    ("--overwrite", "replace results that exist"),
    ("--multirun, -m", "one job for each value of a sweep: key=a,b"),
    ("--cfg job", "show the composed configuration and run nothing"),
    ("--info [defaults|...]", "show how the configuration was composed"),
    ("--config-dir DIR", "config groups of your own"),
    ("--config-name NAME", "train: a recipe in --config-dir"),
    ("--hydra-help", "help of Hydra, which composes configurations"),
    ("--shell-completion install=bash", 'for eval "$(...)": complete with TAB'),
    ("--version", "show the version"),
)

_SUBJECTS = {
    "train": " [RECIPE.yaml]",
    "merge": " [DIR]",
    "extract": "",
    "targets": "",
    "tasks": " [WORDS]",
    "models": " [WORDS]",
    "convert": "",
}


def describe_command(command: str) -> str:
    """Return what a command does, in one line."""
    return (inspect.getdoc(COMMANDS[command]) or "").partition("\n")[0]


def _columns(rows: Iterable[tuple[str, str]], indent: int = 2) -> Iterator[str]:
    table = list(rows)
    width = max(len(left) for left, _ in table)
    for left, right in table:
        yield f"{' ' * indent}{left:<{width}}  {right}".rstrip()


def overview() -> str:
    """Return the text of `lora-cli --help`."""
    first = [EXAMPLES[command][0] for command in COMMANDS]
    first.insert(1, EXAMPLES["train"][1])
    lines = [
        "Fine-tune transformers with LoRA from a YAML recipe.",
        "",
        "usage: lora-cli COMMAND [SUBJECT] [key=value ...] [flags]",
        "",
        "examples:",
        *(f"  {line}" for line in first),
        "",
        "commands (lora-cli COMMAND --help lists all settings):",
        *_columns((command, describe_command(command)) for command in COMMANDS),
        "",
        "flags:",
        *_columns(FLAGS),
        "",
        f"recipes that come with lora-cli: {', '.join(shipped_recipes())}",
    ]
    return "\n".join(lines)


def fold(text: str, width: int) -> str:
    """Break lines between words where they are too wide, in their own column.

    Examples stay in one piece, to be copied.

    Args:
        text: A text of this module.
        width: Characters in a line.
    """
    examples = {f"  {line}" for lines in EXAMPLES.values() for line in lines}
    folded: list[str] = []
    for line in text.split("\n"):
        if len(line) <= width or line in examples:
            folded.append(line)
            continue
        start = len(line) - len(line.lstrip())
        column = line.find("  ", start)
        if 0 < column < width // 2:
            start = column + len(line[column:]) - len(line[column:].lstrip())
        folded += textwrap.wrap(
            line,
            width,
            subsequent_indent=" " * start,
            break_long_words=False,
            break_on_hyphens=False,
        )
    return "\n".join(folded)


def _flags_of(command: str) -> Iterator[tuple[str, str]]:
    for name, text in FLAGS:
        if command in COMMANDS_OF_FLAG.get(name.partition(" ")[0], (command,)):
            yield name, text


def _bounds(key: Key) -> str:
    signs = {"min": ">=", "above": ">", "max": "<=", "below": "<"}
    return "".join(f" {signs[name]} {key.metadata[name]}" for name in signs if name in key.metadata)


def _conditions(key: Key, command: str) -> list[str]:
    """Say with which other settings a setting is read."""
    return [
        shown_choice(selector, "|".join(values)) if values else f"{selector} given"
        for selector, values in key.only.items()
        if selector in all_keys(command)
    ]


def _describe_key(key: Key, needs: Sequence[str]) -> Iterator[str]:
    kind = short_type(key.annotation, key.metadata) + _bounds(key)
    with_ = f"; with {', '.join(needs)}" if needs else ""
    yield f"  {key.name}  ({kind}; default {show(key.default)}{with_})"
    yield f"      {key.help}"
    if factors := describe_factors(key):
        yield f"      {factors}"


def _describe_section(heading: str, keys: Sequence[Key], command: str) -> Iterator[str]:
    """Yield the lines of a section; what all its settings need stands in the heading."""
    needs = {key.name: _conditions(key, command) for key in keys}
    common = [need for need in needs[keys[0].name] if all(need in own for own in needs.values())]
    common = common if heading else []
    with_ = f" (with {', '.join(common)})" if common else ""
    yield f"settings{f' of {heading}' if heading else ''}{with_}:"
    for key in keys:
        yield from _describe_key(key, [need for need in needs[key.name] if need not in common])


def _iter_sections(command: str) -> Iterator[tuple[str, list[Key]]]:
    """Yield headings with the settings under them; one heading for each variant of a section."""
    variants = variants_of(command)
    keys = list(iter_keys(COMMANDS[command]))
    yield "", [key for key in keys if "." not in key.name]
    for section in dict.fromkeys(key.name.partition(".")[0] for key in keys if "." in key.name):
        if section not in variants:
            yield section, [key for key in keys if key.name.startswith(f"{section}.")]
            continue
        for name, cls in variants[section].items():
            many = len(variants[section]) > 1
            heading = f"{section}={name}" if many else section
            yield heading, list(iter_keys(cls, prefix=f"{section}."))


def command_help(command: str) -> str:
    """Return the text of `lora-cli COMMAND --help`."""
    lines = [
        describe_command(command),
        "",
        f"usage: lora-cli {command}{_SUBJECTS.get(command, ' DIR')} [key=value ...] [flags]",
        "",
        "examples:",
        *(f"  {line}" for line in EXAMPLES[command]),
    ]
    if defaults := default_options(command):
        lines += ["", "config groups (choose with GROUP=OPTION):"]
    for group, default in defaults.items():
        lines.append(f"  {group}" + (f"  (default {default})" if default else ""))
        options = group_options(group).items()
        lines += _columns(((name, describe_option(path)) for name, path in options), indent=4)
    # What follows from the choice of a config group cannot be set, nor what the command refuses.
    hidden = {f"{section}.{tag}" for section, (tag, _) in VARIANTS.items()}
    hidden |= set(REFUSED.get(command, ()))
    for heading, keys in _iter_sections(command):
        if shown := [key for key in keys if key.name not in hidden]:
            lines += ["", *_describe_section(heading, shown, command)]
    lines += ["", "flags:", *_columns(_flags_of(command))]
    return "\n".join(lines)

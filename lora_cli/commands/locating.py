"""Where the base of an adapter is, whether it is the one, and where results go.

Nothing here loads a model.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from lora_cli.artifacts.adapter import MERGED_BASE, AdapterRecord, Subject
from lora_cli.config.commands import TrainConfig
from lora_cli.errors import Problem, UserError
from lora_cli.models.folders import KEY
from lora_cli.models.integrity import changed_settings
from lora_cli.models.sources import ModelSource


@contextmanager
def about(key: str) -> Iterator[None]:
    """Say of the problems of a checkpoint which setting named it: it was not model.path."""
    try:
        yield
    except UserError as error:
        raise UserError([_renamed(problem, key) for problem in error.problems]) from error


def _renamed(problem: Problem, key: str) -> Problem:
    if problem.key != KEY:
        return problem
    # What comes after is another model, which would be no help.
    fix = (problem.fix or "").partition(", or ")[0].replace(KEY, key)
    message = problem.message.replace(f"`{KEY}`", f"`{key}`")
    return replace(problem, message=message, key=key, fix=fix or None)


def base_path(config: TrainConfig, record: AdapterRecord, subject: Subject) -> str:
    """Return where the base model of an adapter was when it was trained.

    Raises:
        UserError: If that is a model which a run made for itself, and the run is not known.
    """
    if "folder" not in record.base:
        return config.model.path or ""
    if subject.run is None:
        raise UserError(
            Problem(
                id="adapter.other-base",
                message="`base` must say where the base model is, since that was made by merging "
                "an earlier adapter and the folder is in no run directory.",
                key="base",
                where=str(subject.adapter),
                allowed=f"{record.base.get('name')} with sha256 {record.base.get('sha256')}",
                fix=f"base=RUN/{MERGED_BASE}",
            )
        )
    return str(subject.run / MERGED_BASE)


def check_base(source: ModelSource, record: AdapterRecord, subject: Subject) -> None:
    """Refuse a base whose weights, settings or tokenizer are not those of the training."""
    check_base_weights(source, record, subject)
    check_base_settings(source, record, subject)


def check_base_weights(source: ModelSource, record: AdapterRecord, subject: Subject) -> None:
    """Refuse a base whose weights are not those of the training."""
    if source.sha256 != record.base.get("sha256"):
        rule = "weights that the adapter was trained on"
        raise _other_base(source, record, subject, rule, "others")


def check_base_settings(source: ModelSource, record: AdapterRecord, subject: Subject) -> None:
    """Refuse a base whose settings or tokenizer are not those of the training."""
    if changed := changed_settings(source.settings, record.base.get("settings")):
        rule = "settings and the tokenizer that the adapter was trained with"
        raise _other_base(source, record, subject, rule, f"another {', '.join(changed)}")


def _other_base(
    source: ModelSource, record: AdapterRecord, subject: Subject, rule: str, finding: str
) -> UserError:
    return UserError(
        Problem(
            id="adapter.other-base",
            message=f"The base model must have the {rule}, but {source.name} has {finding}.",
            where=str(subject.adapter),
            allowed=f"{record.base.get('name')} with sha256 {record.base.get('sha256')}",
            fix="base=DIR with the folder or hub id of that model",
        )
    )


def default_output(subject: Subject, output: str | None, name: str) -> Path:
    """Return where a command writes: `output`, or `name` in the run directory.

    Raises:
        UserError: If neither is known.
    """
    if output is not None:
        return Path(output)
    if subject.run is None:
        raise UserError(
            Problem(
                id="output.missing",
                message="`output` must say where to write, since the adapter is in no run "
                "directory.",
                key="output",
                fix=f"output={name}",
            )
        )
    return subject.run / name

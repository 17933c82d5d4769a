"""What the family `chat` says of rows and settings that it refuses."""

from collections.abc import Sequence

from lora_cli.data.types import Row
from lora_cli.errors import Problem
from lora_cli.tasks.chat_template import Refused

NOT_GENERATED = ("perplexity", "token_accuracy")
"""Metrics for which no answers are generated."""


def needs_answers(metric: str) -> Problem:
    """A metric of generated answers, where none are generated."""
    return Problem(
        id="task.metric-needs-answers",
        message=f"`task.metric` must be one that needs no answers where none are generated, but is "
        f"{metric}.",
        key="task.metric",
        allowed=", ".join(NOT_GENERATED),
        fix="task.generate_in_eval=true",
    )


def no_layout(columns: Sequence[str]) -> Problem:
    """Rows that are in none of the known layouts."""
    return Problem(
        id="data.missing-column",
        message="The rows must have a column with messages, or one with the prompt and one with "
        "the completion, but no usual names are there.",
        key="task.data.messages_column",
        allowed=", ".join(columns),
        fix="task.data.messages_column=NAME, or task.data.prompt_column=NAME and "
        "task.data.completion_column=NAME",
    )


def no_question(columns: Sequence[str], *, where: str) -> Problem:
    """Rows to answer without a column in which the user says something."""
    return Problem(
        id="data.missing-column",
        message="The rows must have a column with messages, or with a prompt, but have not.",
        where=where,
        allowed=", ".join(columns),
        fix="rename the column with what the user says to prompt",
    )


def too_long(row: Row, length: int, most: int, *, what: str) -> Problem:
    """A conversation, or its prompt alone, that is longer than it may be."""
    return Problem(
        id="task.overlong",
        message=f"`task.max_length` must be enough for each {what}, but is {most} and one has "
        f"{length} tokens.",
        key="task.max_length",
        where=row.where,
        fix="raise task.max_length, or leave such rows out: task.overlong=drop",
    )


def not_written(row: Row, refused: Refused, *, other: str = "task.chat_template=chatml") -> Problem:
    """A conversation that the template does not write, or not so that turns can be told.

    Args:
        row: The conversation.
        refused: Why not.
        other: How another template is chosen.
    """
    return Problem(
        id="chat.refused",
        message="The chat template must write each conversation so that the assistant's turns can "
        f"be told, but does not: {refused}.",
        key="task.chat_template",
        where=row.where,
        fix=f"correct or remove the row, or choose another template: {other}",
    )

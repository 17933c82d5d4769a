"""Chat templates of lora-cli's own and in files, for `lora_cli.tasks.chat_template`."""

from pathlib import Path
from typing import Any

from lora_cli.errors import Problem, UserError

TEMPLATE_KEY = "task.chat_template"

_MOST_BYTES = 1 << 20

BUILT_IN = {
    "chatml": (
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "alpaca": (
        "{% for message in messages %}"
        "{% if message['role'] == 'user' %}"
        "{{ '### Instruction:\n' + message['content'] + '\n\n' }}"
        "{% elif message['role'] == 'assistant' %}"
        "{{ '### Response:\n' + message['content'] + eos_token + '\n\n' }}"
        "{% else %}{{ message['content'] + '\n\n' }}{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}"
    ),
}
"""Templates for models that have none, by name."""


def read_template(path: Path) -> str:
    """Return what is in a file with a template.

    Raises:
        UserError: If it cannot be read.
    """
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ValueError("it has more than 1 MiB")
        text = path.read_text(encoding="utf-8")
        if not text.strip():
            raise ValueError("it is empty")
    except (OSError, ValueError) as error:
        raise UserError(
            Problem(
                id="chat.no-such-template",
                message=f"`{TEMPLATE_KEY}` must name a template or a file with one, but "
                f'"{path}" cannot be read ({error}).',
                key=TEMPLATE_KEY,
                allowed=", ".join((*BUILT_IN, "a file with a template in Jinja")),
                fix="check the path; it is relative to the recipe or to the current folder",
            )
        ) from error
    return text


def no_template(tokenizer: Any, allowed: str, fix: str) -> Problem:
    """A model whose tokenizer has no chat template."""
    return Problem(
        id="chat.no-template",
        message=f"`{TEMPLATE_KEY}` must say how a conversation is written, since the tokenizer of "
        f"the model ({type(tokenizer).__name__}) has no chat template, but is not set.",
        key=TEMPLATE_KEY,
        allowed=allowed,
        fix=fix,
    )


def bad_template(reason: str, allowed: str, fix: str) -> Problem:
    """A template by which no conversation can be written."""
    return Problem(
        id="chat.bad-template",
        message=f"The chat template must render a question and an answer, but does not: {reason}.",
        key=TEMPLATE_KEY,
        allowed=allowed,
        fix=fix,
    )

"""`lora-cli chat`: talking with an adapter in the terminal, or line by line from a file."""

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from lora_cli.artifacts.adapter import find_subject
from lora_cli.commands.display import Display
from lora_cli.commands.opening import Opened, open_adapter
from lora_cli.commands.options import Options
from lora_cli.commands.writing import with_generation
from lora_cli.config.chat import TalkConfig
from lora_cli.config.composed import Composed
from lora_cli.config.language import ChatConfig
from lora_cli.data.types import Row
from lora_cli.errors import Problem, UserError
from lora_cli.tasks.contract import Features, Task
from lora_cli.training.evaluation import evaluating
from lora_cli.training.runtime import default_device, move_to

Message = dict[str, str]

_COMMANDS = "/reset forgets the conversation, /exit ends it"
_PROMPT = "> "


def run(composed: Composed, options: Options, display: Display) -> int:
    """Answer what is asked until there is no more; return the exit code."""
    config: TalkConfig = composed.config
    find_subject(config.from_ or "")
    opened = open_adapter(config.from_ or "", base=config.base, display=display)
    talk = Talk(opened, config, display, as_json=options.json)
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        display.note(_COMMANDS)
    for line in _lines(is_terminal=is_terminal):
        text = line.strip()
        if text == "/exit":
            break
        if text == "/reset":
            talk.reset()
        elif text.startswith("/") and text[1:].isalpha():
            display.note(f"there is no {text}: {_COMMANDS}")
        elif text:
            try:
                talk.say(text)
            except KeyboardInterrupt:
                # Who sits at the terminal wants no more of this answer, not of the conversation.
                if not is_terminal:
                    raise
                display.output("")
                display.note("the answer was stopped, and this turn is forgotten")
    return 0


class Talk:
    """A conversation.

    Args:
        opened: The adapter, not yet in its model.
        config: What is asked for.
        display: Told of the answers.
        as_json: Show each answer as a JSON object, rather than piece by piece.

    Raises:
        UserError: If the adapter is of another task, or the settings do not go together.
    """

    def __init__(
        self, opened: Opened, config: TalkConfig, display: Display, *, as_json: bool
    ) -> None:
        settings = opened.config.task
        if not isinstance(settings, ChatConfig):
            is_text = opened.family.processor == "tokenizer"
            raise UserError(_other_task(settings.family, "text=TEXT" if is_text else "input=FILE"))
        if config.system is not None:
            settings = replace(settings, system_prompt=config.system)
        settings = with_generation(settings, config.generation)
        state = opened.family.bind_columns(["messages"], opened.record.state, where="chat")
        self._task: Task = opened.family.build(settings, state, opened.processor)
        self._model = opened.attach()
        # Beams are known at their end alone.
        self._is_streaming = not as_json and settings.generation.num_beams == 1
        self._display, self._as_json = display, as_json
        self._messages: list[Message] = []

    def reset(self) -> None:
        """Forget what was said."""
        self._messages = []
        self._display.note("the conversation starts anew")

    def say(self, text: str) -> None:
        """Answer, and remember both.

        A conversation that has become too long loses its oldest turns. A text that is too long by
        itself is not answered. A turn that is interrupted, or whose answer is empty, is forgotten.
        """
        self._messages.append({"role": "user", "content": text})
        features = self._read()
        if features is None:
            self._messages.pop()
            return
        on_text = self._display.piece if self._is_streaming else None
        try:
            answer = self._answer(features, on_text)
        except KeyboardInterrupt:
            self._messages.pop()
            raise
        if self._as_json:
            self._display.output(json.dumps({"user": text, "answer": answer}, ensure_ascii=False))
        else:
            self._display.output("" if self._is_streaming else answer)
        if answer:
            self._messages.append({"role": "assistant", "content": answer})
        else:
            # An assistant that says nothing is no turn that a template could be given.
            self._messages.pop()
            self._display.note("the answer is empty, and this turn is forgotten")

    def _read(self) -> Features | None:
        """Return the conversation as the model reads it, or None if it cannot be read."""
        while True:
            row = Row(str(len(self._messages)), {"messages": self._messages}, "chat", 1)
            try:
                return self._task.encode(row)
            except UserError as error:
                (problem, *_) = error.problems
                if len(self._messages) == 1 or problem.id != "task.overlong":
                    self._display.note(problem.message)
                    return None
                del self._messages[:2]
                self._display.note("the conversation is too long: its oldest turn is forgotten")

    def _answer(self, features: Features, on_text: Callable[[str], None] | None) -> str:
        batch = move_to(self._task.collate([features]), default_device())
        with evaluating(self._model), torch.inference_mode():
            output = self._task.forward(self._model, {**batch, "on_text": on_text})
        (prediction,) = self._task.decode(output.outputs, batch)
        answer: Any = self._task.to_json(prediction)["answer"]
        return str(answer)


def _lines(*, is_terminal: bool) -> Iterator[str]:
    """Yield what is said, line by line."""
    if not is_terminal:
        yield from sys.stdin
        return
    while True:
        try:
            yield input(_PROMPT)
        except EOFError:
            return


def _other_task(family: str, rows: str) -> Problem:
    return Problem(
        id="chat.other-task",
        message=f"`from` must be an adapter for task=chat, but is one for task={family}.",
        key="from",
        fix=f"lora-cli predict DIR {rows}",
    )

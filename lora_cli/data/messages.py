"""Conversations in rows: lists of messages as OpenAI and ShareGPT write them, prompts with answers.

A message is a dict with ``role`` (system, user, assistant or tool), ``content``, a text, and, where
the row has them, ``tool_calls``, ``tool_call_id``, ``name`` and ``reasoning_content``.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from lora_cli.config.tasks import DataConfig
from lora_cli.data.types import Row
from lora_cli.errors import Problem

Message = dict[str, Any]
Columns = Mapping[str, str | None]
Reader = Callable[..., list[Message]]

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
"""What each name of a role means; case does not matter."""

_KEPT = ("tool_calls", "tool_call_id", "name", "reasoning_content")
_LISTED = 10
# By the kind of fault: what must be, what is allowed, and what to do.
_RULES = {
    "bad-messages": (
        "`{column}` must hold a list of messages with texts in every row",
        '[{{"role": "user", "content": "..."}}, ...] or [{{"from": "human", "value": "..."}}, ...]',
        "write each conversation as such a list, or remove the rows",
    ),
    "unknown-role": (
        "`{column}` must hold messages with a known role",
        ", ".join(ROLES),
        "rename the role, or remove the rows",
    ),
    "empty-answer": (
        "`{column}` must hold no assistant turn without text",
        None,
        "fill in the answer, or remove the rows",
    ),
    "no-assistant": (
        "`{column}` must hold an assistant turn in every row, from which to learn",
        None,
        "add the answer, or remove the rows",
    ),
    "no-question": (
        "`{column}` must hold something to answer in every row",
        None,
        "add a user turn, or remove the rows",
    ),
    "bad-prompt": (
        "`{column}` must hold a text in every row",
        None,
        "fill in the text, or remove the rows",
    ),
    "bad-system": (
        "`{column}` must hold a text in every row, which may be empty",
        None,
        "write the system prompt as a text",
    ),
    "bad-documents": (
        "`{column}` must hold a list of passages in every row, which may be empty",
        '["text", ...] or [{{"title": "...", "text": "..."}}, ...]',
        "write the passages as such a list",
    ),
    "image-marks": (
        "`{column}` must hold a mark <image> for each image of the row, or none at all",
        "<image> in what the user says, or parts of type image, in the order of the images",
        "correct the marks or the list of images, or remove the rows",
    ),
    "image-in-answer": (
        "`{column}` must hold images in what users and tools say only",
        None,
        "move the mark <image> into a user turn, or remove the rows",
    ),
}


class Fault(Exception):  # noqa: N818  # becomes a part of a Problem
    """What is wrong with one row: the rule that it breaks, the column, and what is there."""

    def __init__(self, kind: str, column: str, finding: str) -> None:
        super().__init__(finding)
        self.kind, self.column, self.finding = kind, column, finding


def read_messages(row: Row, columns: Columns, *, answering: bool = False) -> list[Message]:
    """Return the conversation of a row that `check_messages` accepts.

    An `input` goes below the prompt after an empty line. The text of a `system` column comes first
    where the messages have no system prompt themselves.

    Args:
        row: The row.
        columns: The column of ``messages``, or those of ``prompt`` and ``completion``; and those of
            ``input`` and ``system``, where there are some.
        answering: Whether the last turn is to be predicted: an assistant turn at the end is left
            out.
    """
    values = row.values
    messages = _listed_messages(row, columns) if columns["messages"] else _turns(row, columns)
    if answering:
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
    system = values.get(columns["system"] or "")
    if system is not None and not isinstance(system, str):
        raise Fault("bad-system", columns["system"] or "", _kind(system))
    if _is_text(system) and not any(message["role"] == "system" for message in messages):
        messages.insert(0, {"role": "system", "content": system})
    return messages


def read_documents(row: Row, column: str | None) -> list[dict[str, str]]:
    """Return the passages of a row, each with ``title``, which may be empty, and ``text``."""
    value = row.values.get(column or "")
    if value is None or column is None:
        return []
    found = []
    for item in value if isinstance(value, list) else [value]:
        passage: Any = {"text": item} if isinstance(item, str) else item
        text = next((passage[key] for key in ("text", "content", "contents") if key in passage), 0)
        title = passage.get("title") or ""
        if not isinstance(text, str) or not isinstance(title, str):
            raise TypeError("a passage is no text")
        found.append({"title": title, "text": text})
    return found


def put_before_question(
    messages: Sequence[Message], documents: Sequence[Mapping[str, str]]
) -> list[Message]:
    """Return the messages with the passages, numbered, before the text of the last user turn."""
    place = max((n for n, one in enumerate(messages) if one["role"] == "user"), default=None)
    if place is None or not documents:
        return list(messages)
    passages = [
        f"[{number}] " + (f"{one['title']}\n" if one["title"] else "") + one["text"]
        for number, one in enumerate(documents, start=1)
    ]
    changed = [dict(message) for message in messages]
    changed[place]["content"] = "\n\n".join([*passages, changed[place]["content"]])
    return changed


def one_layout(columns: Columns) -> dict[str, str | None]:
    """Return the columns without those of a layout that is not read: messages go first."""
    if columns["messages"] is not None:
        return {**columns, "prompt": None, "input": None, "completion": None}
    return dict(columns)


def made_up_rows(data: DataConfig, count: int) -> list[dict[str, Any]]:
    """Return rows with a question and an answer, in the columns that the settings name."""
    rows: list[dict[str, Any]] = []
    for number in range(count):
        question, answer = f"What is {number} and {number + 1}?", f"It is {2 * number + 1}."
        if data.prompt_column is None:
            turns = {"user": question, "assistant": answer}
            messages = [{"role": role, "content": text} for role, text in turns.items()]
            rows.append({data.messages_column or "messages": messages})
        else:
            completion = data.completion_column or "completion"
            rows.append({data.prompt_column: question, completion: answer})
            if data.input_column is not None:
                rows[-1][data.input_column] = ""
    return rows


def check_messages(
    rows: Sequence[Row], columns: Columns, *, answering: bool, read: Reader = read_messages
) -> list[Problem]:
    """Return a problem for each rule that rows break, with all of these rows.

    Args:
        rows: The rows.
        columns: As for `read_messages`, and that of ``documents``.
        answering: Whether the rows are to be answered; else an assistant turn must be there.
        read: What gives the conversation of a row; it raises Fault.
    """
    faults: dict[tuple[str, str], list[tuple[Row, str]]] = {}
    for row in rows:
        try:
            _check(row, columns, answering=answering, read=read)
        except Fault as fault:
            faults.setdefault((fault.kind, fault.column), []).append((row, fault.finding))
    return [_problem(kind, column, bad) for (kind, column), bad in faults.items()]


def _check(row: Row, columns: Columns, *, answering: bool, read: Reader) -> None:
    column = columns["messages"] or columns["prompt"] or ""
    messages = read(row, columns, answering=answering)
    if answering and (not messages or messages[-1]["role"] == "system"):
        raise Fault("no-question", column, "none")
    if not answering and not any(message["role"] == "assistant" for message in messages):
        raise Fault("no-assistant", column, "none")
    if (documents := columns.get("documents")) is not None:
        try:
            read_documents(row, documents)
        except (TypeError, AttributeError):
            raise Fault("bad-documents", documents, "another value") from None


def _turns(row: Row, columns: Columns) -> list[Message]:
    """Return the messages of a row with a prompt and, where it has a column, an answer."""
    prompt, more = row.values.get(columns["prompt"] or ""), row.values.get(columns["input"] or "")
    if not _is_text(prompt):
        raise Fault("bad-prompt", columns["prompt"] or "", _kind(prompt))
    if more is not None and not isinstance(more, str):
        raise Fault("bad-prompt", columns["input"] or "", _kind(more))
    asked = f"{prompt}\n\n{more}" if _is_text(more) else prompt
    messages = [{"role": "user", "content": asked}]
    if (column := columns["completion"]) is not None:
        answer = row.values.get(column)
        if not _is_text(answer):
            raise Fault("empty-answer", column, _kind(answer))
        messages.append({"role": "assistant", "content": answer})
    return messages


def _listed_messages(row: Row, columns: Columns) -> list[Message]:
    column = columns["messages"] or ""
    value = row.values.get(column)
    if not isinstance(value, list) or not value:
        raise Fault("bad-messages", column, "empty" if value == [] else _kind(value))
    return list(_iter_messages(value, column))


def _iter_messages(value: Sequence[Any], column: str) -> Iterator[Message]:
    for number, item in enumerate(value, start=1):
        if not isinstance(item, Mapping):
            raise Fault("bad-messages", column, f"message {number} is {_kind(item)}")
        # A table of both layouts has null where a row is of the other one.
        name, told = (
            item[key] if item.get(key) is not None else item.get(other)
            for key, other in (("role", "from"), ("content", "value"))
        )
        role = ROLES.get(name.casefold()) if isinstance(name, str) else None
        if role is None:
            shown = f'"{name[:40]}"' if isinstance(name, str) else _kind(name)
            raise Fault("unknown-role", column, f"message {number}: {shown}")
        content = _content(told)
        extra = {key: item[key] for key in _KEPT if item.get(key)}
        if content is None and "tool_calls" not in extra:
            found = "parts of which one is no text" if isinstance(told, list) else _kind(told)
            kind = "empty-answer" if role == "assistant" and told is None else "bad-messages"
            raise Fault(kind, column, f"content of message {number}: {found}")
        if role == "assistant" and not (content or "").strip() and "tool_calls" not in extra:
            raise Fault("empty-answer", column, f"message {number}")
        yield {"role": role, "content": content or "", **extra}


def _content(value: Any) -> str | None:
    """Return a text, or the texts of a list of parts, one below the other; None if it is neither.

    Of a message with another part, such as an image, nothing is returned.
    """
    if isinstance(value, list) and value:
        parts = [part.get("text") if isinstance(part, Mapping) else part for part in value]
        texts = [part for part in parts if isinstance(part, str)]
        return "\n".join(texts) if len(texts) == len(parts) else None
    return value if isinstance(value, str) else None


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, str):
        return "a text" if value.strip() else "empty"
    kinds: dict[type, str] = {list: "a list", dict: "an object", bool: "true or false"}
    return kinds.get(type(value), "a number" if isinstance(value, int | float) else "no text")


def _problem(kind: str, column: str, bad: Sequence[tuple[Row, str]]) -> Problem:
    rule, allowed, fix = _RULES[kind]
    count = "1 row does" if len(bad) == 1 else f"{len(bad)} rows do"
    listed = ", ".join(
        row.where if finding == "none" else f"{row.where} ({finding})"
        for row, finding in bad[:_LISTED]
    )
    more = f" and {len(bad) - _LISTED} more" if len(bad) > _LISTED else ""
    return Problem(
        id=f"data.{kind}",
        message=f"{rule.format(column=column)}, but {count} not.",
        where=listed + more,
        allowed=None if allowed is None else allowed.format(),
        fix=fix,
    )

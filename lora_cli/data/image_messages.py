"""Images in conversations: where in the text each stands, and where its file is.

An image stands where a text has the mark ``<image>``, as LLaVA's data have it, or where a message
has a part of type image among parts of type text. Where neither is there, the images come before
the first text of the user. In the messages that are returned each place is told by `IMAGE`.

The files are in a column, one image or a list of them, or in the parts themselves, under
``image``, ``path``, ``url`` or ``image_url``.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from lora_cli.data.media import MediaError, Place, locate
from lora_cli.data.messages import Columns, Fault, Message, read_messages
from lora_cli.data.types import Row

MARK = "<image>"
IMAGE = "\ue0f4image\ue0f5"
"""What stands for an image in the text of a message: characters that no text has by itself."""

_ROLES = ("messages", "prompt", "input", "completion", "system")
_TEXTS = ("content", "value")
_FILES = ("image", "path", "url", "image_url")


def read_image_messages(row: Row, columns: Columns, *, answering: bool = False) -> list[Message]:
    """Return the conversation of a row as `read_messages` does, with `IMAGE` for each image.

    Raises:
        Fault: As `read_messages`, and if the marks are not as many as the images, or some are
            where no image can be.
    """
    column = columns["messages"] or columns["prompt"] or ""
    texts = [name for role in _ROLES if (name := columns[role]) is not None and name in row.values]
    marked = {name: _marked(row.values[name]) for name in texts}
    values = {**row.values, **marked}
    messages = read_messages(replace(row, values=values), columns, answering=answering)
    if any(IMAGE in one["content"] for one in messages if one["role"] not in ("user", "tool")):
        raise Fault("image-in-answer", column, "none")
    images = list_images(row, columns)
    marks = sum(one["content"].count(IMAGE) for one in messages)
    asking = next((one for one in messages if one["role"] == "user"), None)
    if not marks and images and asking is not None:
        asking["content"] = IMAGE * len(images) + asking["content"]
    elif marks != len(images):
        raise Fault("image-marks", column, f"{_count(marks, 'mark')}, {_count(len(images))}")
    return messages


def list_images(row: Row, columns: Columns) -> list[Any]:
    """Return what a row says of the file of each of its images, in order.

    Raises:
        Fault: If some are in a column and others in the messages.
    """
    value = row.values.get(columns["image"] or "")
    listed = list(value) if isinstance(value, list | tuple) else [value]
    found = [one for one in listed if one is not None]
    column = columns["messages"] or ""
    inside = list(_inside(row.values.get(column)))
    if found and inside:
        raise Fault("image-marks", column, f"files in {columns['image']} and in the messages")
    return found or inside


def locate_images(row: Row, columns: Columns) -> tuple[list[Place], list[tuple[str, str]]]:
    """Look up the files of a row, without opening any.

    Returns:
        Their places; and name and reason of each that is not there.

    Raises:
        Fault: As `list_images`.
    """
    places, missing = [], []
    for value in list_images(row, columns):
        try:
            places.append(locate(value, row.source))
        except MediaError as error:
            missing.append((image_name(value, row), str(error)))
    return places, missing


def image_name(value: Any, row: Row) -> str:
    """Return what to call an image of a row: its path as written, and the place of the row."""
    path = value.get("path") if isinstance(value, Mapping) else value
    return f"{path} of {row.where}" if isinstance(path, str) and path else row.where


def with_places(row: Row, columns: Columns, column: str, places: Sequence[Place]) -> Row:
    """Return a row whose images are in a column, as places, and no longer in its messages."""
    values = {**row.values, column: list(places)}
    messages = columns["messages"] or ""
    if isinstance(value := values.get(messages), list):
        values[messages] = [_without_files(one) for one in value]
    return replace(row, values=values)


def _marked(value: Any) -> Any:
    """Return a prompt, or a list of messages, whose texts have `IMAGE` where images are."""
    if isinstance(value, str):
        return value.replace(MARK, IMAGE)
    if not isinstance(value, list):
        return value
    return [
        {name: _text(part) if name in _TEXTS else part for name, part in one.items()}
        if isinstance(one, Mapping)
        else one
        for one in value
    ]


def _text(content: Any) -> Any:
    """Return the text of a message; as it is where its parts are neither texts nor images."""
    if isinstance(content, str):
        return content.replace(MARK, IMAGE)
    if not isinstance(content, list):
        return content
    found = ""
    for part in content:
        if _is_image(part):
            found += IMAGE
            continue
        text = part.get("text") if isinstance(part, Mapping) else part
        if not isinstance(text, str):
            return content
        # Texts of several parts stand below each other; an image is no text.
        between = "\n" if found and not found.endswith(IMAGE) else ""
        found += between + text.replace(MARK, IMAGE)
    return found


def _is_image(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") in ("image", "image_url")


def _inside(messages: Any) -> Iterator[Any]:
    """Yield what parts of messages say of their files."""
    for one in messages if isinstance(messages, list) else ():
        for name in _TEXTS:
            parts = one.get(name) if isinstance(one, Mapping) else None
            for part in parts if isinstance(parts, list) else ():
                if _is_image(part):
                    values = (part[key] for key in _FILES if part.get(key) is not None)
                    yield from (
                        value.get("url", value) if isinstance(value, Mapping) else value
                        for value in list(values)[:1]
                    )


def _without_files(message: Any) -> Any:
    if not isinstance(message, Mapping):
        return message
    return {
        name: [{"type": "image"} if _is_image(part) else part for part in value]
        if name in _TEXTS and isinstance(value, list)
        else value
        for name, value in message.items()
    }


def _count(number: int, what: str = "image") -> str:
    return f"{number} {what}" + "s" * (number != 1)

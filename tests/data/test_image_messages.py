from pathlib import Path
from typing import Any

import pytest

from lora_cli.data.image_messages import (
    IMAGE,
    image_name,
    list_images,
    locate_images,
    read_image_messages,
    with_places,
)
from lora_cli.data.messages import Fault
from lora_cli.data.types import Row

COLUMNS = {
    **dict.fromkeys(("prompt", "input", "completion", "system")),
    "messages": "messages",
    "image": "images",
}
PROMPTS = {**COLUMNS, "messages": None, "prompt": "question", "completion": "answer"}


def talk(*contents: Any, images: Any = None, **more: Any) -> Row:
    roles = ("user", "assistant") * len(contents)
    messages = [
        {"role": role, "content": text} for role, text in zip(roles, contents, strict=False)
    ]
    return Row("1", {"messages": messages, "images": images, **more}, "rows.jsonl", 1)


def contents(row: Row, columns: Any = COLUMNS, **options: Any) -> list[str]:
    return [one["content"] for one in read_image_messages(row, columns, **options)]


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ("a <image>\nb <image>", f"a {IMAGE}\nb {IMAGE}"),
        ("a b", f"{IMAGE}{IMAGE}a b"),
        (["<image>", {"type": "text", "text": "b <image>"}], f"{IMAGE}b {IMAGE}"),
        (
            [{"type": "image"}, "a", {"type": "text", "text": "b"}, {"type": "image_url"}],
            f"{IMAGE}a\nb{IMAGE}",
        ),
    ],
)
def test_places_of_images(asked: Any, expected: str) -> None:
    assert contents(talk(asked, "c", images=["1.png", "2.png"])) == [expected, "c"]


def test_other_layouts() -> None:
    turns = [{"from": "human", "value": "<image> a"}, {"from": "gpt", "value": "b"}]
    row = Row("1", {"messages": turns, "images": "1.png"}, "rows.jsonl", 1)
    assert contents(row) == [f"{IMAGE} a", "b"]
    row = Row("1", {"question": "a", "answer": "b", "images": "1.png"}, "rows.jsonl", 1)
    assert contents(row, PROMPTS) == [f"{IMAGE}a", "b"]
    assert contents(talk("a", "b")) == ["a", "b"]
    assert contents(talk("<image>", "b", "c", "d", images=["1.png"]), answering=True) == [
        IMAGE,
        "b",
        "c",
    ]


@pytest.mark.parametrize(
    ("row", "kind", "finding"),
    [
        (talk("<image>", "b"), "image-marks", "1 mark, 0 images"),
        (talk("<image>", "b", images=["1", "2"]), "image-marks", "1 mark, 2 images"),
        (talk("a", "<image>", images=["1"]), "image-in-answer", "none"),
        (
            talk([{"type": "image", "image": "2"}], "b", images=["1"]),
            "image-marks",
            "files in images and in the messages",
        ),
        (talk([{"type": "video"}], "b", images=["1"]), "bad-messages", None),
    ],
)
def test_faults(row: Row, kind: str, finding: str | None) -> None:
    with pytest.raises(Fault) as caught:
        read_image_messages(row, COLUMNS)
    assert caught.value.kind == kind
    assert finding in (None, caught.value.finding)


def test_files_in_messages() -> None:
    asked = [
        {"type": "image", "image": "1.png", "text": None},
        {"type": "image_url", "image_url": {"url": "2.png"}},
        {"type": "image", "path": "3.png"},
        {"type": "image", "image": {"bytes": b"4", "path": None}},
        {"type": "text", "text": "what?"},
    ]
    row = talk(asked, "b")
    assert list_images(row, COLUMNS) == ["1.png", "2.png", "3.png", {"bytes": b"4", "path": None}]
    assert contents(row) == [f"{IMAGE * 4}what?", "b"]


def test_places_of_files(tmp_path: Path) -> None:
    (tmp_path / "1.png").write_bytes(b"1")
    source = str(tmp_path / "rows.jsonl")
    parts = [{"type": "image", "image": name} for name in ("1.png", "2.png")]
    row = Row("7", talk(parts, "b").values, source, 7)
    (place,), missing = locate_images(row, COLUMNS)
    assert place["size"] == 1
    assert missing == [(f"2.png of {source} row 7", "no such file or directory")]
    changed = with_places(row, COLUMNS, "images", [place, place])
    assert changed.values["images"] == [place, place]
    assert locate_images(changed, COLUMNS) == ([place, place], [])
    assert contents(changed) == [IMAGE * 2, "b"]
    assert contents(row) == [IMAGE * 2, "b"]
    assert image_name(None, row) == f"{source} row 7"

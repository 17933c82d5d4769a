"""Chat with images against transformers: its processor, its chat template, its loss."""

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from tiny_image_chat import IMAGES, square, write_squares, write_tiny_image_chat

from lora_cli.config.generation import GenerationConfig
from lora_cli.config.language import ImageChatConfig
from lora_cli.config.tasks import DataConfig
from lora_cli.data.types import Row
from lora_cli.errors import UserError
from lora_cli.models.processors import load_processor
from lora_cli.models.sources import resolve_model
from lora_cli.tasks import output_head
from lora_cli.tasks.image_chat import ImageChat

FAMILY = ImageChat()


@pytest.fixture(scope="module")
def squares(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_squares(tmp_path_factory.mktemp("squares"))


@pytest.fixture(scope="module", params=IMAGES)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    write_tiny_image_chat(folder, request.param)
    return folder


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llava")
    write_tiny_image_chat(folder, "llava")
    return folder


def settings(data: Path, **more: Any) -> ImageChatConfig:
    return ImageChatConfig(data=DataConfig(path=str(data)), **more)


def open_processor(folder: Path) -> Any:
    source = resolve_model(str(folder), processor=FAMILY.processor)
    return load_processor(source, FAMILY.processor)


def open_model(folder: Path) -> Any:
    return transformers.AutoModelForImageTextToText.from_pretrained(folder).eval()


def shown(row: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """The messages of a row as transformers takes them, with images of Pillow."""
    files = iter(row["images"])

    def image() -> dict[str, Any]:
        return {"type": "image", "image": Image.open(folder / next(files))}

    messages = []
    for number, one in enumerate(row["messages"]):
        before, mark, after = one["content"].partition("<image>")
        parts: list[dict[str, Any]] = []
        if mark or (number == 0 and "<image>" not in json.dumps(row["messages"])):
            parts.append(image())
        text = after.strip("\n") if mark else before
        messages.append({**one, "content": [*parts, {"type": "text", "text": text}]})
    return messages


def labels_of(ids: list[int], tokenizer: Any) -> list[int]:
    """What is between `<|im_start|> assistant` and `<|im_end|>`, which belongs to it."""
    start, end, name = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>", "assistant"])
    labels, is_answer = [-100] * len(ids), False
    for place, token in enumerate(ids):
        if is_answer:
            labels[place] = token
        if place and ids[place - 1 : place + 1] == [start, name]:
            is_answer = True
        elif token == end:
            is_answer = False
    return labels


def test_tokens_and_loss_are_those_of_transformers(base: Path, squares: Path) -> None:
    config = settings(squares)
    splits = FAMILY.load(config, seed=0)
    processor, model = open_processor(base), open_model(base)
    task = FAMILY.build(config, splits.state, processor)
    rows = [json.loads(line) for line in (squares / "validation.jsonl").read_text().splitlines()]
    assert {len(row["images"]) for row in rows} == {1, 2}
    features = [task.encode(row) for row in splits.rows["validation"]]
    total, count = 0.0, 0
    for row, own in zip(rows, features, strict=True):
        inputs = processor.apply_chat_template(
            shown(row, squares), tokenize=True, return_dict=True, return_tensors="pt"
        )
        (ids,) = inputs["input_ids"].tolist()
        assert own["sequences"][0]["input_ids"] == ids
        labels = torch.tensor([labels_of(ids, processor.tokenizer)])
        learned = int((labels != -100).sum())
        assert own["supervised"] == learned == (8 if len(row["images"]) == 2 else 4)
        assert own["measures"]["images"] == len(row["images"])
        with torch.no_grad():
            loss = float(model(**inputs, labels=labels).loss)
        total, count = total + loss * learned, count + learned
    for seed in ({}, {"seed": 1}):
        with torch.no_grad():
            found = task.forward(model, {**task.collate(json.loads(json.dumps(features))), **seed})
        assert found.count == count
        assert float(found.loss_sum) == pytest.approx(total, rel=1e-4)


def test_how_the_head_is_used_does_not_depend_on_the_first_batch(base: Path, squares: Path) -> None:
    """A run that is resumed meets another batch first, and must compute the same."""
    config = settings(squares)
    splits = FAMILY.load(config, seed=0)
    task = FAMILY.build(config, splits.state, open_processor(base))
    shown = splits.rows["train"][:2]
    said = [{"role": "user", "content": "what ?"}, {"role": "assistant", "content": "it is red"}]
    plain = replace(shown[0], id="plain", values={"messages": said, "images": []})
    features = [task.encode(row) for row in (*shown, plain)]
    losses, kinds = [], []
    for first in (features[0], features[-1]):
        model = open_model(base)
        with torch.no_grad():
            task.forward(model, {**task.collate([first]), "seed": 1})
            losses.append(task.forward(model, {**task.collate(features), "seed": 1}).loss_sum)
        kinds.append(output_head._KNOWN[model.get_output_embeddings()].kind)
    assert kinds == ["slices", "slices"]
    assert torch.equal(*losses)


def test_passes_of_few_lines_get_their_own_images(
    base: Path, squares: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(squares)
    splits = FAMILY.load(config, seed=0)
    model = open_model(base)
    task = FAMILY.build(config, splits.state, open_processor(base))
    batch = task.collate([task.encode(row) for row in splits.rows["validation"]])
    with torch.no_grad():
        whole = task.forward(model, batch)
        monkeypatch.setattr("lora_cli.tasks.language._TOKENS_AT_ONCE", 100)
        parts = task.forward(model, batch)
    torch.testing.assert_close(parts.outputs, whole.outputs, rtol=1e-4, atol=1e-4)


def test_answers_are_those_that_transformers_writes(base: Path, squares: Path) -> None:
    config = settings(squares, generate_in_eval=True, generation=GenerationConfig(max_new_tokens=6))
    splits = FAMILY.load(config, seed=0)
    processor, model = open_processor(base), open_model(base)
    task = FAMILY.build(config, splits.state, processor)
    rows = [json.loads(line) for line in (squares / "validation.jsonl").read_text().splitlines()]
    batch = task.collate([task.encode(row) for row in splits.rows["validation"]])
    with torch.no_grad():
        found = task.decode(task.forward(model, batch).outputs, batch)
    for row, own in zip(rows, found, strict=True):
        asked = {**row, "messages": row["messages"][:-1]}
        inputs = processor.apply_chat_template(
            shown(asked, squares), add_generation_prompt=True, tokenize=True, return_dict=True,
            return_tensors="pt",
        )  # fmt: skip
        end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
        stops = [end, processor.tokenizer.eos_token_id]
        written = model.generate(**inputs, max_new_tokens=6, do_sample=False, eos_token_id=stops)
        new = written[0, inputs["input_ids"].shape[1] :]
        assert own.text == processor.tokenizer.decode(new, skip_special_tokens=True).strip()
        assert own.references == (row["messages"][-1]["content"],)


@pytest.mark.parametrize("kind", ["question", "parts", "inside", "text"])
def test_rows_of_other_shapes(llava: Path, squares: Path, tmp_path: Path, kind: str) -> None:
    """Each says what a row of messages with a mark says."""
    (tmp_path / "a.png").write_bytes(square("red", random.Random(1)))
    asked, answer = "what colour is it ?", "it is red"
    image: dict[str, Any] = {"type": "image", "text": None}
    text = {"type": "text", "text": asked}
    said = [{"role": "assistant", "content": answer}]
    rows: dict[str, dict[str, Any]] = {
        "plain": {
            "image": "a.png",
            "messages": [{"role": "user", "content": f"<image>{asked}"}, *said],
        },
        "question": {"image": "a.png", "question": asked, "answer": answer},
        "parts": {
            "images": ["a.png"],
            "messages": [{"role": "user", "content": [image, text]}, *said],
        },
        "inside": {
            "messages": [{"role": "user", "content": [{**image, "image": "a.png"}, text]}, *said]
        },
        "text": {"messages": [{"role": "user", "content": asked}, *said]},
    }
    processor, found = open_processor(llava), {}
    for name in ("plain", kind):
        more = [rows["plain"]] if name == "text" else []
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in [*([rows[name]] * 9), *more]))
        config = settings(path)
        splits = FAMILY.load(config, seed=0)
        task = FAMILY.build(config, splits.state, processor)
        found[name] = task.encode(next(row for row in splits.rows["train"] if row.id == "1"))
    plain, other = found["plain"], found[kind]
    if kind == "text":
        mark = processor.image_token_id
        assert other["places"] == []
        ids = [token for token in plain["sequences"][0]["input_ids"] if token != mark]
        assert other["sequences"][0]["input_ids"] == ids
    else:
        assert other["sequences"] == plain["sequences"]
        assert other["places"] == plain["places"]
    assert other["supervised"] == plain["supervised"] == 4


def load_error(path: Path, rows: list[dict[str, Any]], good: dict[str, Any]) -> Any:
    for split, own in (("train", rows), ("validation", [good])):
        (path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))
    with pytest.raises(UserError) as caught:
        FAMILY.load(settings(path), seed=0)
    return caught.value.problems


def test_marks_must_be_as_many_as_images(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(square("red", random.Random(1)))
    good = {"images": ["a.png"], "question": "<image> what ?", "answer": "it"}
    bad = [
        {**good, "question": "<image> what <image> ?"},
        {**good, "images": ["a.png", "a.png"]},
        {**good, "images": None},
    ]
    (problem,) = load_error(tmp_path, [good, *bad, {**good, "question": "what ?"}], good)
    assert problem.id == "data.image-marks"
    assert "3 rows do not" in problem.message
    for part in (
        "row 2 (2 marks, 1 image)",
        "row 3 (1 mark, 2 images)",
        "row 4 (1 mark, 0 images)",
    ):
        assert part in problem.where
    (problem,) = load_error(tmp_path, [good, {**good, "answer": "an <image>"}], good)
    assert problem.id == "data.image-in-answer"
    inside = [{"type": "image", "image": "a.png"}]
    messages = [{"role": "user", "content": inside}, {"role": "assistant", "content": "it"}]
    both = {"images": ["a.png"], "messages": messages}
    (problem,) = load_error(tmp_path, [both], {**both, "images": None})
    assert "files in images and in the messages" in problem.where


def test_all_missing_files_are_told_of_at_once(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(square("red", random.Random(1)))
    row = {"images": ["a.png", "b.png"], "question": "what ?", "answer": "it"}
    inside = [{"role": "user", "content": [{"type": "image", "image": "c.png"}]}]
    talk = {"messages": [*inside, {"role": "assistant", "content": "it"}]}
    (problem,) = load_error(
        tmp_path, [row, {**row, "images": "a.png"}], {**row, "images": ["d.png"]}
    )
    assert problem.id == "data.bad-image"
    assert "b.png of" in problem.where
    assert "d.png of" in problem.where
    assert "a.png" not in problem.where
    (problem,) = load_error(tmp_path, [talk], talk)
    assert "c.png of" in problem.where
    blind = {"question": "what ?", "answer": "it"}
    (problem,) = load_error(tmp_path, [blind], blind)
    assert problem.id == "data.no-images"


def test_a_row_is_never_cut(llava: Path, squares: Path) -> None:
    config = settings(squares, max_length=32)
    splits = FAMILY.load(config, seed=0)
    task = FAMILY.build(config, splits.state, open_processor(llava))
    encoded = [task.encode(row) for row in splits.rows["train"]]
    assert {bool(row.get("left_out")) for row in encoded} == {False, True}
    assert all(bool(row.get("left_out")) == (row["length"] > 32) for row in encoded)
    assert {row["cut"] for row in encoded} == {0}
    strict = FAMILY.build(replace(config, overlong="error"), splits.state, open_processor(llava))
    long = next(row for row in splits.rows["train"] if len(row.values["images"]) == 2)
    with pytest.raises(UserError, match=r"`task.max_length` must be enough"):
        strict.encode(long)


def test_images_of_many_pixels_are_made_smaller(tmp_path: Path, squares: Path) -> None:
    write_tiny_image_chat(tmp_path / "base", "qwen2_vl")
    processor = open_processor(tmp_path / "base")
    splits = FAMILY.load(settings(squares), seed=0)
    row = splits.rows["train"][0]
    lengths = [
        FAMILY.build(settings(squares, max_pixels=most), splits.state, processor).encode(row)[
            "length"
        ]
        for most in (None, 64)
    ]
    assert lengths[1] < lengths[0]


def test_templates_and_settings_that_cannot_be(llava: Path, squares: Path) -> None:
    splits = FAMILY.load(settings(squares), seed=0)
    text = "{% for m in messages %}{{ m.role + ' ' + m.content }}{% endfor %}"
    ignoring = "{% for m in messages %}{{ m.role }} {{ m.content[-1].text }}\n{% endfor %}"
    for template in (text, ignoring):
        state = {**splits.state, "chat_template": template}
        with pytest.raises(UserError) as caught:
            FAMILY.build(settings(squares), state, open_processor(llava))
        assert caught.value.problems[0].id == "chat.no-images"
    bare = open_processor(llava)
    bare.chat_template = bare.tokenizer.chat_template = None
    with pytest.raises(UserError, match="has no chat template") as caught:
        FAMILY.build(settings(squares), splits.state, bare)
    assert "chatml" not in str(caught.value.problems[0])
    many = settings(squares, generation=GenerationConfig(num_beams=2))
    with pytest.raises(UserError, match="num_beams"):
        FAMILY.build(many, splits.state, open_processor(llava))


def test_a_row_to_answer_is_checked(squares: Path) -> None:
    state = FAMILY.load(settings(squares), seed=0).state
    row = Row("1", {"image": None, "question": "a <image>"}, "rows", 1)
    bound = FAMILY.bind_columns(list(row.values), state, where="rows")
    with pytest.raises(UserError, match="a mark <image> for each image"):
        FAMILY.check_row(row, bound)
    with pytest.raises(UserError, match="must be there and be readable"):
        FAMILY.check_row(replace(row, values={**row.values, "image": "none.png"}), bound)


def test_an_image_that_the_processor_does_not_take_is_named(tmp_path: Path, squares: Path) -> None:
    write_tiny_image_chat(tmp_path / "base", "qwen2_vl")
    (tmp_path / "long.png").write_bytes(square("red", random.Random(1), size=(900, 2)))
    splits = FAMILY.load(settings(squares), seed=0)
    task = FAMILY.build(settings(squares), splits.state, open_processor(tmp_path / "base"))
    row = {"images": ["long.png"], "messages": splits.rows["train"][0].values["messages"]}
    with pytest.raises(UserError, match="aspect ratio") as caught:
        task.encode(Row("7", row, str(tmp_path / "rows.jsonl"), 7))
    assert "rows.jsonl row 7" in str(caught.value.problems[0].where)


def test_models_with_an_encoder_for_texts_are_refused() -> None:
    config = transformers.T5Config(d_model=8, d_ff=8, num_layers=1, num_heads=1, vocab_size=8)
    with pytest.raises(UserError, match="this t5 has an encoder of its own"):
        FAMILY.fit_model(transformers.T5ForConditionalGeneration(config), {})

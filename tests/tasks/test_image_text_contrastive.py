"""The losses, beside those of transformers on the same batch, and what is made of the outputs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tiny_vision import write_captioned, write_tiny_pairs

from lora_cli.config.media import ImageTextContrastiveConfig, ZeroShotConfig
from lora_cli.data.types import Row
from lora_cli.errors import UserError
from lora_cli.tasks.image_text_contrastive import ImageTextContrastive, pair_loss

KINDS = ("clip", "siglip", "chinese_clip", "siglip2", "metaclip_2")
CAPTIONS = ["a red square", "a blue square on a red square", "green", "a pink square"]
STATE = {"columns": {"image": "image", "caption": "text", "label": None}}
LENGTH = 16


@pytest.fixture(scope="module")
def squares(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = write_captioned(tmp_path_factory.mktemp("squares"))
    return sorted((folder / "test").glob("*.png"))[: len(CAPTIONS)]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, Any]]:
    made: dict[str, tuple[Any, Any]] = {}

    def make(kind: str) -> tuple[Any, Any]:
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            write_tiny_pairs(folder, kind, captions=CAPTIONS)
            model = transformers.AutoModelForZeroShotImageClassification.from_pretrained(folder)
            made[kind] = model.eval(), transformers.AutoProcessor.from_pretrained(folder)
        return made[kind]

    return make


def build(processor: Any, *, labels: tuple[str, ...] | None = None, **columns: Any) -> Any:
    config = ImageTextContrastiveConfig(
        max_length=LENGTH, zero_shot=ZeroShotConfig(labels=labels, prompt="a {} square")
    )
    state = {"columns": {**STATE["columns"], **columns}}
    return ImageTextContrastive().build(config, state, processor)


def batch_of(task: Any, files: list[Path], **more: list[Any]) -> Any:
    rows = [
        Row(str(n), {"image": str(file), "text": text, **{k: v[n] for k, v in more.items()}}, "", n)
        for n, (file, text) in enumerate(zip(files, CAPTIONS, strict=True))
    ]
    return task.collate([task.encode(row) for row in rows])


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_that_of_transformers(
    kind: str, bases: Callable[[str], tuple[Any, Any]], squares: list[Path]
) -> None:
    model, processor = bases(kind)
    task = build(processor)
    batch = batch_of(task, squares)
    found = task.forward(model, batch)
    padding = "max_length" if "siglip" in kind else True
    cut = {"truncation": True, "max_length": LENGTH, "padding": padding}
    images = [Image.open(file).convert("RGB") for file in squares]
    theirs = model(
        **processor.image_processor(images=images, return_tensors="pt"),
        **processor.tokenizer(CAPTIONS, return_tensors="pt", **cut),
        return_loss=True,
    )
    assert found.count == len(CAPTIONS)
    torch.testing.assert_close(found.loss_sum / found.count, theirs.loss)
    torch.testing.assert_close(found.outputs["texts"], theirs.text_embeds)
    gradients = [
        torch.autograd.grad(loss, next(iter(model.vision_model.parameters())))[0]
        for loss in (found.loss_sum / found.count, theirs.loss)
    ]
    torch.testing.assert_close(*gradients)
    assert gradients[0].any()


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_prompts_of_labels_leave_the_loss_as_it_is(
    kind: str, bases: Callable[[str], tuple[Any, Any]], squares: list[Path]
) -> None:
    model, processor = bases(kind)
    plain = build(processor)
    task = build(processor, labels=("red", "pink"), label="kind")
    batch = batch_of(task, squares, kind=["red", 1, "pink", "red"])
    assert batch["labels"] == [0, 1, 1, 0]
    with torch.no_grad():
        found = task.forward(model, batch)
    torch.testing.assert_close(found.loss_sum, plain.forward(model, batch).loss_sum)
    assert found.outputs["labels"].shape == (len(CAPTIONS), 2)
    # In training nobody looks at them.
    assert "labels" not in task.forward(model, {**batch, "seed": 1}).outputs
    rows = task.decode(found.outputs, batch)
    padding = {"padding": "max_length", "max_length": LENGTH} if kind == "siglip" else {}
    with torch.no_grad():
        logits = model(
            **processor.image_processor(
                images=[Image.open(file) for file in squares], return_tensors="pt"
            ),
            **processor.tokenizer(
                ["a red square", "a pink square"], return_tensors="pt", **padding
            ),
        ).logits_per_image
    expected = logits.sigmoid() if kind == "siglip" else logits.softmax(-1)
    np.testing.assert_allclose([row.scores for row in rows], expected.numpy(), rtol=1e-4)
    right = [row.label == row.reference for row in rows]
    assert task.metrics(rows)["zero_shot_accuracy"] == np.mean(right)
    line = task.to_json(rows[0])
    assert line["reference"] == "red"
    assert list(line["probabilities"]) == ["red", "pink"]
    cosine = float(found.outputs["images"][0] @ found.outputs["texts"][0])
    assert line["similarity"] == pytest.approx(cosine, abs=1e-6)


def test_a_row_says_the_same_in_any_batch(
    bases: Callable[[str], tuple[Any, Any]], squares: list[Path]
) -> None:
    model, processor = bases("clip")
    task = build(processor)
    whole = batch_of(task, squares)
    one = {name: value[2:3] if isinstance(value, list) else value for name, value in whole.items()}
    with torch.no_grad():
        expected, found = (task.forward(model, batch).outputs for batch in (whole, one))
    for name in ("images", "texts"):
        torch.testing.assert_close(found[name][0], expected[name][2])


def test_images_alone_are_given_labels_and_no_loss(
    bases: Callable[[str], tuple[Any, Any]], squares: list[Path]
) -> None:
    model, processor = bases("clip")
    task = build(processor, labels=("red", "pink"), caption=None)
    batch = batch_of(task, squares)
    found = task.forward(model, batch)
    assert (float(found.loss_sum), found.count) == (0, 0)
    rows = task.decode(found.outputs, batch)
    assert task.metrics(rows) == {}
    assert set(task.to_json(rows[0])) == {"id", "label", "probabilities"}


def test_long_captions_keep_their_last_token(bases: Callable[[str], tuple[Any, Any]]) -> None:
    _, processor = bases("clip")
    task = build(processor)
    ids, cut = task._reader._tokens("red " * 40)
    assert len(ids) == LENGTH
    assert ids[-1] == processor.tokenizer.eos_token_id
    assert cut == 42 - LENGTH


def test_the_losses_by_hand() -> None:
    logits = torch.tensor([[2.0, -1.0], [0.5, 3.0]])
    rows = -(logits.softmax(1)[0, 0].log() + logits.softmax(1)[1, 1].log())
    columns = -(logits.softmax(0)[0, 0].log() + logits.softmax(0)[1, 1].log())
    torch.testing.assert_close(pair_loss(logits, is_sigmoid=False), (rows + columns) / 2)
    signs = torch.tensor([[1.0, -1], [-1, 1]])
    torch.testing.assert_close(
        pair_loss(logits, is_sigmoid=True), -(signs * logits).sigmoid().log().sum()
    )


def test_what_is_no_dual_encoder_is_refused() -> None:
    family = ImageTextContrastive()
    config = transformers.BertConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
    )
    with pytest.raises(UserError, match="this bert is none") as caught:
        family.fit_model(transformers.BertModel(config), STATE)
    assert caught.value.problems[0].id == "model.no-dual-encoder"


def test_repeated_captions_and_images_are_told() -> None:
    def row(number: int, name: str, text: str) -> Row:
        return Row(str(number), {"image": {"file": name}, "text": text}, "", number)

    rows = [row(1, "a", "red"), row(2, "b", "red"), row(3, "b", "blue"), row(4, "c", "green")]
    notes = ImageTextContrastive().notes(rows, STATE)
    assert [note.partition(";")[0] for note in notes] == [
        "train: 2 of 4 rows have the caption of another row",
        "train: 2 of 4 rows have the image of another row",
    ]
    assert ImageTextContrastive().notes(rows[2:], STATE) == ()


def test_a_cut_keeps_the_rows_of_an_image_together() -> None:
    groups = ImageTextContrastive().groups({"image": "image"})
    rows = tuple(Row(str(n), {"image": {"file": f"{n // 5}.png"}}, "", n) for n in range(50))
    train, cut = groups.cut(rows, 10, split="validation", seed=0)
    assert (len(train), len(cut)) == (40, 10)
    files = [{row.values["image"]["file"] for row in part} for part in (train, cut)]
    assert not files[0] & files[1]

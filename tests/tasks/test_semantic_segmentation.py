"""Loss, sizes and counts of the classes of pixels, beside transformers and scikit-learn."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from sklearn.metrics import confusion_matrix
from tiny_scenes import PIXELS, SIZES, scene
from transformers.modeling_outputs import SemanticSegmenterOutput

from lora_cli.config.media import MaskAugmentationConfig, SemanticSegmentationConfig
from lora_cli.data.types import Row
from lora_cli.tasks.semantic_segmentation import (
    SemanticSegmentation,
    best_classes,
    count_pixels,
)

STATE = {"labels": ["ground", "red", "blue"], "columns": {"image": "image", "mask": "mask"}}
FAMILY = SemanticSegmentation()


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    folder, draw, found = tmp_path_factory.mktemp("scenes"), random.Random(0), []
    for number in range(4):
        picture, mask, _ = scene(draw, size=(40 + number, 36))
        # Some pixels have no class.
        mask.paste(255, (0, 0, 7, 4 + number))
        picture.save(folder / f"{number}.png")
        mask.save(folder / f"{number}-mask.png")
        values = {"image": f"{number}.png", "mask": f"{number}-mask.png"}
        found.append(Row(str(number), values, str(folder / "rows.jsonl"), number))
    return found


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    # What is dropped differs from row to row.
    off = {"drop_path_rate": 0.0, "classifier_dropout_prob": 0.0}
    config = transformers.SegformerConfig(**SIZES["segformer"], **off, num_labels=3)
    found = transformers.SegformerForSemanticSegmentation(config).eval()
    norm = found.decode_head.batch_norm
    norm.running_mean.normal_(std=0.1)
    return found


def make_task(**augmentation: float) -> Any:
    processor = transformers.SegformerImageProcessorPil(size={"height": PIXELS, "width": PIXELS})
    off = {"crop_scale": 1.0, "flip": 0.0, "color_jitter": 0.0}
    how = MaskAugmentationConfig(**{**off, **augmentation})
    return FAMILY.build(SemanticSegmentationConfig(augmentation=how), STATE, processor)


def batch_of(task: Any, rows: list[Row]) -> Any:
    return task.collate([task.encode(row) for row in rows])


def folder_of(rows: list[Row]) -> Path:
    return Path(rows[0].source).parent


def test_the_loss_is_that_of_transformers(rows: list[Row], model: Any) -> None:
    task = make_task()
    output = task.forward(model, batch_of(task, rows))
    processor = transformers.SegformerImageProcessorPil(size={"height": PIXELS, "width": PIXELS})
    folder = folder_of(rows)
    inputs = processor(
        images=[Image.open(folder / row.values["image"]) for row in rows],
        segmentation_maps=[Image.open(folder / row.values["mask"]) for row in rows],
        return_tensors="pt",
    )
    expected = model(**inputs).loss
    torch.testing.assert_close(output.loss_sum / output.count, expected)
    assert output.count == int((inputs["labels"] != 255).sum())


def test_a_batch_is_the_sum_of_its_rows_in_training_too(rows: list[Row], model: Any) -> None:
    task = make_task(crop_scale=0.5, flip=0.5)
    model.train()
    batches = [batch_of(task, [row]) for row in rows]
    whole = task.forward(model, {**batch_of(task, rows), "seed": 3})
    parts = [task.forward(model, {**batch, "seed": 3}) for batch in batches]
    assert whole.count == sum(part.count for part in parts)
    torch.testing.assert_close(whole.loss_sum, sum(part.loss_sum for part in parts))
    assert whole.outputs == {}
    model.eval()


def test_counts_are_those_of_scikit_learn_at_the_size_of_the_mask(
    rows: list[Row], model: Any
) -> None:
    task = make_task()
    batch = batch_of(task, rows)
    predictions = task.decode(task.forward(model, batch).outputs, batch)
    processor = transformers.SegformerImageProcessorPil(size={"height": PIXELS, "width": PIXELS})
    for row, prediction in zip(rows, predictions, strict=True):
        image = Image.open(folder_of(rows) / row.values["image"])
        mask = np.array(Image.open(folder_of(rows) / row.values["mask"]))
        with torch.no_grad():
            found = model(**processor(images=image, return_tensors="pt"))
        (map_HW,) = processor.post_process_semantic_segmentation(found, [image.size[::-1]])
        known = mask != 255
        table = confusion_matrix(mask[known], map_HW.numpy()[known], labels=range(3))
        expected = np.stack([np.diag(table), table.sum(0), table.sum(1)])
        assert prediction.counts.tolist() == expected.tolist()


def test_many_classes_are_compared_a_part_at_a_time() -> None:
    torch.manual_seed(0)
    logits = torch.randn(1, 40, 5, 6)
    processor = transformers.SegformerImageProcessorPil()
    outputs = SemanticSegmenterOutput(logits=logits)
    (expected,) = processor.post_process_semantic_segmentation(outputs, [(31, 17)])
    assert torch.equal(best_classes(logits[0], (31, 17)), expected)
    assert expected.max() > 16


def test_pixels_without_a_class_are_not_counted() -> None:
    found, mask = torch.tensor([[0, 1, 1]]), torch.tensor([[0, -1, 0]])
    assert count_pixels(found, mask, 2).tolist() == [[1, 0], [1, 1], [2, 0]]


def test_images_without_a_mask_get_one_of_their_size(rows: list[Row], model: Any) -> None:
    state = {**STATE, "columns": {"image": "image", "mask": None}}
    task = FAMILY.build(SemanticSegmentationConfig(), state, make_task()._reader._processor)
    batch = batch_of(task, rows)
    output = task.forward(model, batch)
    assert output.count == 0
    predictions = task.decode(output.outputs, batch)
    assert [row.classes.shape for row in predictions] == [(36, 40 + n) for n in range(4)]
    assert min(row.classes.min() for row in predictions) >= 0
    line = task.to_json(predictions[0])
    assert set(line) == {"id", "mask", "shares"}
    assert sum(line["shares"].values()) == pytest.approx(1)


def test_what_is_seen_in_training_alone_is_taken_out() -> None:
    config = transformers.BeitConfig(
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=32,
        patch_size=8,
        out_indices=[1, 2, 3, 4],
        pool_scales=[1],
        num_labels=2,
    )
    model = transformers.BeitForSemanticSegmentation(config).eval()
    images = torch.randn(1, 3, 32, 32)
    before = model(pixel_values=images).logits
    FAMILY.fit_model(model, STATE)
    assert not any("auxiliary" in name for name in model.state_dict())
    again = transformers.BeitForSemanticSegmentation(model.config)
    again.load_state_dict(model.state_dict())
    torch.testing.assert_close(again.eval()(pixel_values=images).logits, before)


def test_no_part_of_an_image_is_cut_off() -> None:
    processor = transformers.MobileViTImageProcessorPil()
    assert processor.do_center_crop
    fitted = FAMILY.fit_processor(processor, STATE)
    image = np.zeros((50, 90, 3), np.uint8)
    image[:, :5] = 255
    pixels = fitted(images=[image], return_tensors="pt", input_data_format="channels_last")
    assert pixels["pixel_values"].shape == (1, 3, 256, 256)
    assert pixels["pixel_values"][0, :, 128, 0].min() > 0.9
    assert fitted.to_dict()["size"] == {"height": 256, "width": 256}

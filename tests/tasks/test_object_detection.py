"""Loss and boxes of detectors, beside transformers."""

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from tiny_scenes import PIXELS, SIZES, scene, stir, tiny_detr, tiny_rt_detr
from transformers.image_transforms import center_to_corners_format

from lora_cli.config.media import BoxAugmentationConfig, ObjectDetectionConfig
from lora_cli.data.types import Row
from lora_cli.errors import UserError
from lora_cli.tasks.boxed_images import relative_boxes
from lora_cli.tasks.object_detection import (
    ObjectDetection,
    counting_alone,
)

STATE = {
    "labels": ["blue", "red"],
    "columns": {"image": "image", "objects": "objects"},
    "numbered": False,
}
FAMILY = ObjectDetection()
SIZE = {"shortest_edge": PIXELS, "longest_edge": 2 * PIXELS}
QUIET = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    folder, draw, found = tmp_path_factory.mktemp("boxes"), random.Random(0), []
    for number in range(3):
        picture, _, boxes = scene(draw, size=(40 + 6 * number, 36))
        picture.save(folder / f"{number}.png")
        sides = [[x, y, right - x, low - y] for x, y, right, low in boxes.values()][:number]
        objects = {"bbox": sides, "category": list(boxes)[:number]}
        values = {"image": f"{number}.png", "objects": objects}
        found.append(Row(str(number), values, str(folder / "rows.jsonl"), number))
    return found


def make_model(kind: str) -> Any:
    torch.manual_seed(0)
    config: Any
    match kind:
        case "yolos":
            config = transformers.YolosConfig(**SIZES["yolos"])
        case "rt_detr":
            config = tiny_rt_detr()
        case _:
            config = tiny_detr(kind, **QUIET, auxiliary_loss=True)
    config.num_labels = 2
    model: Any = transformers.AutoModelForObjectDetection.from_config(config).eval()
    stir(model)
    return model


def make_task(**changes: Any) -> Any:
    config = ObjectDetectionConfig(augmentation=BoxAugmentationConfig(flip=0.5), **changes)
    return FAMILY.build(config, STATE, transformers.YolosImageProcessorPil(size=SIZE))


def batch_of(task: Any, rows: list[Row]) -> Any:
    return task.collate([task.encode(row) for row in rows])


def annotations(row: Row) -> dict[str, Any]:
    objects = row.values["objects"]
    return {
        "image_id": 1,
        "annotations": [
            {"bbox": box, "category_id": STATE["labels"].index(name), "area": 1, "iscrowd": 0}
            for box, name in zip(objects["bbox"], objects["category"], strict=True)
        ],
    }


@pytest.mark.parametrize("kind", ["yolos", "detr", "conditional_detr", "rt_detr"])
def test_the_loss_of_an_image_is_that_of_transformers(rows: list[Row], kind: str) -> None:
    model, task = make_model(kind), make_task()
    output = task.forward(model, batch_of(task, rows))
    processor: Any = transformers.YolosImageProcessorPil(size=SIZE)
    losses = []
    for row in rows:
        image = Image.open(Path(row.source).parent / row.values["image"])
        inputs = processor(images=image, annotations=annotations(row), return_tensors="pt")
        given = {name: inputs[name] for name in ("pixel_values", "labels")}
        with torch.no_grad():
            losses.append(model(**given).loss)
    assert output.count == 3
    torch.testing.assert_close(output.loss_sum, torch.stack(losses).sum())


@pytest.mark.parametrize("kind", ["yolos", "detr"])
def test_gradients_of_parts_add_up_to_those_of_the_whole(rows: list[Row], kind: str) -> None:
    model, task = make_model(kind).train(), make_task()
    found = []
    for parts in ([rows], [[row] for row in rows]):
        model.zero_grad()
        for part in parts:
            task.forward(model, {**batch_of(task, part), "seed": 1}).loss_sum.backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["yolos", "conditional_detr"])
def test_boxes_are_those_of_transformers(rows: list[Row], kind: str) -> None:
    model, task = make_model(kind), make_task()
    batch = batch_of(task, rows)
    output = task.forward(model, batch)
    predictions = task.decode(output.outputs, batch)
    processor: Any = (
        transformers.YolosImageProcessorPil()
        if kind == "yolos"
        else transformers.ConditionalDetrImageProcessorPil()
    )
    sizes = [(height, width) for width, height in batch["sizes"]]
    theirs = processor.post_process_object_detection(
        SimpleNamespace(**output.outputs), threshold=0.0, target_sizes=sizes
    )
    for prediction, expected in zip(predictions, theirs, strict=True):
        order = expected["scores"].argsort(descending=True, stable=True)
        scores = torch.from_numpy(prediction.found.scores)
        torch.testing.assert_close(scores, expected["scores"][order])
        found = torch.from_numpy(prediction.found.corners)
        torch.testing.assert_close(found, expected["boxes"][order], atol=1e-4, rtol=1e-4)
        assert prediction.found.labels.tolist() == expected["labels"][order].tolist()


def test_boxes_are_mirrored_with_their_image(rows: list[Row]) -> None:
    task, seen = make_task(), []

    def model(pixel_values: torch.Tensor, labels: Any) -> Any:
        seen.append((pixel_values[0], labels[0]))
        empty = {"logits": torch.zeros(1, 1, 3), "pred_boxes": torch.zeros(1, 1, 4)}
        return SimpleNamespace(loss=torch.zeros(()), **empty)

    batch, mirrored = batch_of(task, rows[2:]), 0
    (corners,) = (boxes.corners for boxes in batch["boxes"])
    for seed in range(8):
        task.forward(model, {**batch, "seed": seed})
        pixels, label = seen[-1]
        height, width = pixels.shape[-2:]
        scale = torch.tensor([width, height, width, height])
        for box, name in zip(
            center_to_corners_format(label["boxes"]) * scale, label["class_labels"], strict=True
        ):
            x, y = int((box[0] + box[2]) / 2), int((box[1] + box[3]) / 2)
            red, blue = float(pixels[0, y, x]), float(pixels[2, y, x])
            assert (red > blue) == (STATE["labels"][name] == "red")
        plain = relative_boxes(batch["boxes"][0], batch["sizes"][0])["boxes"]
        mirrored += not torch.equal(plain, label["boxes"])
    assert 0 < mirrored < 8
    assert (batch["boxes"][0].corners == corners).all()


def test_other_processes_are_not_asked_for_their_boxes() -> None:
    from transformers.loss import loss_for_object_detection as module

    assert module.is_accelerate_available()
    with counting_alone():
        assert not module.is_accelerate_available()
    assert module.is_accelerate_available()


def test_lines_hold_sure_boxes_or_all_beside_the_true_ones(rows: list[Row]) -> None:
    task, model = make_task(threshold=0.4), make_model("yolos")
    batch = batch_of(task, rows[1:])
    outputs = task.forward(model, batch).outputs
    line = task.to_json(task.decode(outputs, batch)[0])
    assert len(line["boxes"]) == 6
    assert line["reference"] == [
        {"bbox": rows[1].values["objects"]["bbox"][0], "label": "red", "score": 1.0}
    ]
    unknown = task.to_json(task.decode(outputs, {**batch, "boxes": None})[0])
    assert set(unknown) == {"id", "boxes"}
    assert [box for box in line["boxes"] if box["score"] >= 0.4] == unknown["boxes"]


def test_corners_are_read_where_they_are_set(rows: list[Row]) -> None:
    (box,) = rows[1].values["objects"]["bbox"]
    corners = [box[0], box[1], box[0] + box[2], box[1] + box[3]]
    row = Row("1", {**rows[1].values, "objects": [{"bbox": corners, "category": "red"}]}, "", 1)
    row = Row("1", row.values, rows[1].source, 1)
    assert make_task(box_format="corners").encode(row)["boxes"] == [[tuple(corners)], [1]]
    assert make_task().encode(rows[1])["boxes"] == [[tuple(corners)], [1]]


def test_boxes_are_cut_where_that_is_set(rows: list[Row]) -> None:
    objects = {"bbox": [[-3, 5, 9, 9], [5, 5, 0, 9]], "category": ["red", "blue"]}
    row = Row("1", {**rows[1].values, "objects": objects}, rows[1].source, 1)
    found = make_task(unfit_boxes="cut").encode(row)
    assert (found["boxes"], found["supervised"]) == ([[(0, 5, 6, 14)], [1]], 1)
    with pytest.raises(UserError, match="images with all of their boxes inside"):
        make_task().encode(row)


def test_train_must_have_objects(rows: list[Row]) -> None:
    columns = {"image": "image", "objects": "objects"}
    config: Any = ObjectDetectionConfig()
    loaded: Any = None
    with pytest.raises(UserError, match="all of its rows are without objects"):
        FAMILY.learn(config, rows[:1], loaded, columns)
    assert FAMILY.learn(config, rows[:2], loaded, columns)["labels"] == ["red"]

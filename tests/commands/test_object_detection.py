"""Images with boxes through every command, on a tiny YOLOS and coloured rectangles."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from PIL import Image
from tiny_scenes import SIZES, write_boxes, write_rows, write_tiny_detector
from trained_run import TrainedRun

from lora_cli.metrics.detection import detection_metrics
from lora_cli.tasks.object_detection import _boxes


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_boxes(tmp_path_factory.mktemp("boxes"), train=8, test=4)


@pytest.fixture(scope="module")
def trained(run_cli: Any, scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainedRun:
    base, cwd = tmp_path_factory.mktemp("yolos"), tmp_path_factory.mktemp("run")
    write_tiny_detector(base, transformers.YolosConfig(**SIZES["yolos"]))
    settings = (
        f"model.path={base}",
        "task=object_detection",
        f"task.data.path={scenes}",
        "lora=all-linear",
        "optimizer.lr=0.01",
        "trainer.overfit_rows=4",
        "task.augmentation.flip=0",
        "trainer.global_batch_size=4",
        "trainer.max_steps=80",
        "trainer.eval_steps=80",
    )
    done = run_cli("train", *settings, "run.name=a", cwd=cwd)
    assert done.code == 0, done.err
    return TrainedRun(cwd / "runs" / "a", base, scenes, settings)


def test_training_finds_the_rectangles_that_it_has_seen(trained: TrainedRun) -> None:
    result = trained.result
    assert set(result["adapter"]) == {"map", "map_50", "loss"}
    assert result["adapter"]["map"] > 0.7
    assert result["base"]["map"] < 0.2
    assert result["merged"] == pytest.approx(result["adapter"], abs=1e-3)
    page = (trained.path / "report.html").read_text()
    assert '<th scope="col">AP</th><th scope="col">AP50</th><th scope="col">boxes</th>' in page
    report = json.loads((trained.path / "data_report.json").read_text())["train"]
    assert report["labels"] == {"blue": 4, "red": 4}


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_peft_and_transformers_say_the_same(
    trained: TrainedRun, run_cli: Any, tmp_path: Path
) -> None:
    merged = tmp_path / "merged"
    done = run_cli("merge", trained.path, f"output={merged}", "--json", cwd=tmp_path)
    assert done.code == 0, done.err
    assert done.lines[0]["max_abs_difference"] < 1e-4
    processor: Any = transformers.AutoImageProcessor.from_pretrained(merged)
    image = Image.open(trained.data / "images" / "train-0.png")
    inputs = {"pixel_values": processor(images=image, return_tensors="pt")["pixel_values"]}
    auto = transformers.AutoModelForObjectDetection
    base = auto.from_pretrained(trained.base, num_labels=2)
    adapter = peft.PeftModel.from_pretrained(base, trained.path / "adapter").eval()
    plain = auto.from_pretrained(merged).eval()
    with torch.no_grad():
        found, theirs = adapter(**inputs), plain(**inputs)
    for name in ("logits", "pred_boxes"):
        torch.testing.assert_close(theirs[name], found[name], atol=1e-4, rtol=1e-4)
    assert plain.config.id2label == {0: "blue", 1: "red"}


def test_metrics_are_those_of_the_boxes_that_are_written(
    trained: TrainedRun, run_cli: Any, tmp_path: Path
) -> None:
    done = run_cli("eval", trained.path, "--json", cwd=tmp_path)
    assert done.code == 0, done.err
    lines = (trained.path / "predictions" / "test.jsonl").read_text().splitlines()
    sides: dict[str, list[Any]] = {"boxes": [], "reference": []}
    for line in map(json.loads, lines):
        for name, into in sides.items():
            corners = [
                [x, y, x + wide, y + high] for x, y, wide, high in (b["bbox"] for b in line[name])
            ]
            own = _boxes(corners, [("blue", "red").index(box["label"]) for box in line[name]])
            own.scores[:] = [box["score"] for box in line[name]]
            into.append(own)
    scores = detection_metrics(sides["boxes"], sides["reference"], 2)
    assert done.lines[0]["adapter"]["map"] == pytest.approx(scores["map"], abs=1e-6)
    assert scores["map"] > 0.01


def test_predict_writes_boxes_of_images(trained: TrainedRun, run_cli: Any, tmp_path: Path) -> None:
    done = run_cli(
        "predict", trained.path, f"input={trained.data}/images/train-0.png", cwd=tmp_path
    )
    assert done.code == 0, done.err
    (line,) = done.lines
    true = json.loads((trained.data / "train.jsonl").read_text().splitlines()[0])["objects"]
    found = {box["label"]: box["bbox"] for box in line["boxes"]}
    for name, box in zip(true["category"], true["bbox"], strict=True):
        assert found[name] == pytest.approx(box, abs=4)


def test_files_of_coco_are_read(trained: TrainedRun, run_cli: Any, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (trained.data / "train.jsonl").read_text().splitlines()]
    names = ["blue", "red"]
    document = {
        "images": [
            {"id": number, "file_name": Path(row["image"]).name} for number, row in enumerate(rows)
        ],
        "categories": [{"id": 5 + number, "name": name} for number, name in enumerate(names)],
        "annotations": [
            {"image_id": number, "bbox": box, "category_id": 5 + names.index(name)}
            for number, row in enumerate(rows)
            for box, name in zip(*row["objects"].values(), strict=True)
        ],
    }
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "instances_val2017.json").write_text(json.dumps(document))
    (tmp_path / "val2017").symlink_to(trained.data / "images")
    found = []
    for data in (tmp_path, trained.data / "train.jsonl"):
        done = run_cli("eval", trained.path, f"task.data.path={data}", "--json", cwd=tmp_path)
        assert done.code == 0, done.err
        found.append(done.lines[0]["adapter"])
    assert found[0] == pytest.approx(found[1])


@pytest.fixture
def refused(trained: TrainedRun, run_cli: Any, tmp_path: Path) -> Callable[..., str]:
    """Function: train on changed rows, which is refused; returns what was said."""

    def run(change: Callable[[int, dict[str, Any]], Any]) -> str:
        rows = map(json.loads, (trained.data / "train.jsonl").read_text().splitlines())
        changed = []
        for number, row in enumerate(rows):
            change(number, row)
            changed.append({**row, "image": str(trained.data / row["image"])})
        data = write_rows(tmp_path / "train.jsonl", changed)
        settings = [s for s in trained.settings if "data.path" not in s and "overfit" not in s]
        done = run_cli("train", *settings, f"task.data.path={data}", "run.name=b", cwd=tmp_path)
        assert done.code == 2
        assert not (tmp_path / "runs").exists()
        said: str = done.err
        return said

    return run


def test_boxes_outside_of_the_image_are_told_together(refused: Callable[..., str]) -> None:
    def change(number: int, row: dict[str, Any]) -> None:
        if number < 2:
            row["objects"]["bbox"][0] = [[5, 5, 90, 9], [5, 5, 0, 9]][number]

    said = refused(change)
    assert said.count("error[data.bad-box]") == 1
    assert "images with all of their boxes inside, but 2 cannot be" in said
    assert "the box [5.0, 5.0, 90.0, 9.0] is not inside of 40 x 36 pixels" in said
    assert "the box [5.0, 5.0, 0.0, 9.0] is empty" in said


def test_objects_that_are_none_and_missing_images_are_told(refused: Callable[..., str]) -> None:
    def change(number: int, row: dict[str, Any]) -> None:
        if number == 1:
            row["objects"] = {"bbox": [[1, 2, 3]], "category": ["red"]}

    said = refused(change)
    assert "error[data.bad-objects]" in said
    assert "train.jsonl row 2 (the box of object 1 is no list of four numbers)" in said
    assert "error[data.bad-image]" in refused(lambda number, row: row.update(image=f"{number}.png"))


def test_onnx_is_refused_with_the_reason(trained: TrainedRun, run_cli: Any, tmp_path: Path) -> None:
    done = run_cli("export", trained.path, "output=m.onnx", cwd=tmp_path)
    assert done.code == 2
    assert "reads images in many sizes" in done.err


def test_a_small_run_of_a_named_model(run_cli: Any, tmp_path: Path) -> None:
    done = run_cli("train", "model=yolos-tiny", "task=cppe5", "smoke=true", cwd=tmp_path)
    assert done.code == 0, done.err
    assert "smoke: passed" in done.err

"""Images with masks through every command, on a tiny SegFormer and coloured rectangles."""

import base64
import json
import shutil
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from PIL import Image
from sklearn import metrics
from tiny_scenes import write_rows, write_scenes, write_tiny_segformer
from trained_run import TrainedRun


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scenes(tmp_path_factory.mktemp("scenes"))


@pytest.fixture(scope="module")
def trained(run_cli: Any, scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainedRun:
    base, cwd = tmp_path_factory.mktemp("segformer"), tmp_path_factory.mktemp("run")
    write_tiny_segformer(base)
    settings = (
        f"model.path={base}",
        "task=semantic_segmentation",
        f"task.data.path={scenes}",
        "task.data.label_names=[ground,red,blue]",
        "optimizer.lr=0.02",
        "trainer.global_batch_size=8",
        "trainer.epochs=15",
        "trainer.eval_steps=15",
    )
    done = run_cli("train", *settings, "run.name=a", cwd=cwd)
    assert done.code == 0, done.err
    return TrainedRun(cwd / "runs" / "a", base, scenes, settings)


@pytest.fixture
def refused(trained: TrainedRun, run_cli: Any, tmp_path: Path) -> Callable[..., str]:
    """Function: train on other data, which is refused; returns what was said."""

    def run(data: Path, *more: str) -> str:
        settings = [s for s in trained.settings if not s.startswith("task.data.")]
        done = run_cli(
            "train", *settings, f"task.data.path={data}", *more, "run.name=b", cwd=tmp_path
        )
        assert done.code == 2
        assert not (tmp_path / "runs").exists()
        said: str = done.err
        return said

    return run


def test_training_finds_the_rectangles(trained: TrainedRun) -> None:
    result = trained.result
    assert set(result["adapter"]) == {"mean_iou", "pixel_accuracy", "loss"}
    assert result["adapter"]["mean_iou"] > 0.75 > 0.5 > result["base"]["mean_iou"]
    assert result["merged"] == pytest.approx(result["adapter"], abs=1e-4)
    page = (trained.path / "report.html").read_text()
    assert '<th scope="col">IoU</th><th scope="col">pixels</th>' in page


def inputs_of(model: Path, trained: TrainedRun) -> dict[str, torch.Tensor]:
    """Inputs that are made by transformers alone."""
    processor: Any = transformers.AutoImageProcessor.from_pretrained(model)
    files = sorted((trained.data / "test" / "images").iterdir())
    return dict(processor(images=[Image.open(file) for file in files], return_tensors="pt"))


@pytest.fixture(scope="module")
def merged(trained: TrainedRun, run_cli: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("merged") / "model"
    done = run_cli("merge", trained.path, f"output={output}", "--json", cwd=output.parent)
    assert done.code == 0, done.err
    assert done.lines[0]["max_abs_difference"] < 1e-4
    return output


def logits_of(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(**inputs).logits
    return found


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_peft_and_transformers_say_the_same(trained: TrainedRun, merged: Path) -> None:
    inputs = inputs_of(merged, trained)
    auto = transformers.AutoModelForSemanticSegmentation
    base = auto.from_pretrained(trained.base, num_labels=3)
    adapter = peft.PeftModel.from_pretrained(base, trained.path / "adapter")
    assert adapter.peft_config["default"].task_type is None
    plain = auto.from_pretrained(merged)
    found = logits_of(plain, inputs)
    torch.testing.assert_close(logits_of(adapter, inputs), found, atol=1e-4, rtol=1e-4)
    assert plain.config.id2label == {0: "ground", 1: "red", 2: "blue"}


@pytest.mark.slow
def test_onnx_says_the_same(
    trained: TrainedRun, merged: Path, run_cli: Any, tmp_path: Path
) -> None:
    output = tmp_path / "model.onnx"
    done = run_cli("export", trained.path, f"output={output}", "--json", cwd=tmp_path)
    assert done.code == 0, done.err
    import onnxruntime

    inputs = inputs_of(merged, trained)
    session = onnxruntime.InferenceSession(str(output), providers=["CPUExecutionProvider"])
    (graph,) = session.run(None, {name: x.numpy() for name, x in inputs.items()})
    plain = transformers.AutoModelForSemanticSegmentation.from_pretrained(merged)
    np.testing.assert_allclose(graph, logits_of(plain, inputs).numpy(), atol=1e-4)


def test_metrics_are_those_of_the_masks_that_are_predicted(
    trained: TrainedRun, run_cli: Any, tmp_path: Path
) -> None:
    done = run_cli("eval", trained.path, "--json", cwd=tmp_path)
    assert done.code == 0, done.err
    scores = done.lines[0]["adapter"]
    images = trained.data / "test" / "images"
    again = run_cli("predict", trained.path, f"input={images}", cwd=tmp_path)
    assert again.code == 0, again.err
    found, true = [], []
    for line in again.lines:
        mask = Image.open(trained.data / "test" / "masks" / line["image"])
        picture = Image.open(BytesIO(base64.b64decode(line["mask"])))
        assert picture.size == mask.size
        found.append(np.array(picture).ravel())
        true.append(np.array(mask).ravel())
    sides = np.concatenate(true), np.concatenate(found)
    assert scores["mean_iou"] == pytest.approx(metrics.jaccard_score(*sides, average="macro"))
    assert scores["pixel_accuracy"] == pytest.approx(metrics.accuracy_score(*sides))
    lines = (trained.path / "predictions" / "test.jsonl").read_text().splitlines()
    pixels = [json.loads(line)["pixels"] for line in lines]
    assert sum(row["red"]["actual"] for row in pixels) == int((sides[0] == 1).sum())


def test_rows_with_paths_and_bytes_are_read(
    trained: TrainedRun, run_cli: Any, tmp_path: Path
) -> None:
    folder = trained.data / "test"
    names = [f"{number}.png" for number in range(8)]
    rows = [
        {"image": str(folder / "images" / name), "annotation": str(folder / "masks" / name)}
        for name in names
    ]
    paths = write_rows(tmp_path / "rows.jsonl", rows)
    held = [
        {role: {"bytes": Path(path).read_bytes(), "path": None} for role, path in row.items()}
        for row in rows
    ]
    pq.write_table(pa.Table.from_pylist(held), tmp_path / "rows.parquet")
    found = []
    for data in (paths, tmp_path / "rows.parquet"):
        more = (f"task.data.path={data}", "task.data.mask_column=annotation", "--json")
        done = run_cli("eval", trained.path, *more, cwd=tmp_path)
        assert done.code == 0, done.err
        found.append(done.lines[0]["adapter"])
    assert found[0] == pytest.approx(found[1])


def test_wrong_masks_are_told_together(
    trained: TrainedRun, refused: Callable[..., str], tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(trained.data, folder)
    masks = folder / "train" / "masks"
    Image.new("RGB", (40, 36)).save(masks / "0.png")
    Image.new("L", (9, 7)).save(masks / "1.png")
    Image.new("L", (42, 36), 7).save(masks / "2.png")
    (folder / "validation" / "masks" / "3.png").write_bytes(b"no image")
    said = refused(folder, "task.data.label_names=[ground,red,blue]")
    assert said.count("error[data.bad-mask]") == 1
    assert "All files of the rows must be there and be readable as masks, but 4 cannot be." in said
    for reason in (
        "RGB colours in place of the number of a class",
        "9 x 7 pixels for an image of 41 x 36",
        "class 7, while the last one is 2",
        "no image of a known format",
    ):
        assert reason in said


def test_missing_masks_are_told(
    trained: TrainedRun, refused: Callable[..., str], tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(trained.data, folder)
    (folder / "train" / "masks" / "4.png").unlink()
    said = refused(folder)
    assert "error[data.bad-mask]" in said
    assert f"{folder}/train/masks/4.png (no such file or directory)" in said


def test_one_class_cannot_be_learned(
    trained: TrainedRun, refused: Callable[..., str], tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(trained.data, folder)
    for path in folder.rglob("masks/*.png"):
        Image.new("L", (40, 36), 0).save(path)
    assert "`train` must hold at least two different labels" in refused(folder)


def test_other_names_of_classes_are_refused(
    trained: TrainedRun, run_cli: Any, tmp_path: Path
) -> None:
    more = (f"task.data.path={trained.data}", "task.data.label_names=[ground,blue,red]")
    done = run_cli("eval", trained.path, *more, cwd=tmp_path)
    assert done.code == 2
    assert "must be the labels that the adapter was trained on" in done.err


def test_a_small_run_of_a_named_model(run_cli: Any, tmp_path: Path) -> None:
    done = run_cli("train", "model=segformer-b0", "task=human_parsing", "smoke=true", cwd=tmp_path)
    assert done.code == 0, done.err
    assert "smoke: passed" in done.err

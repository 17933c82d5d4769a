"""Images through every command, on tiny models and images that can be told apart."""

import csv
import json
import random
import shutil
from collections.abc import Callable
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
from tiny_vision import png, striped, write_image_folder, write_tiny_vision
from trained_run import TrainedRun

# Layers that are adapted, by model; the last of ConvNeXt is a convolution.
KINDS = {
    "vit": ("q_proj", "v_proj"),
    "convnext": ("pwconv1", "pwconv2", "downsampling_layer.1"),
    "clip": ("q_proj", "v_proj"),
}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_image_folder(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind)
            write_tiny_vision(made[kind], kind)
        return made[kind]

    return make


@pytest.fixture(scope="module")
def train(
    run_cli: Any, images: Path, bases: Callable[[str], Path], tmp_path_factory: Any
) -> Callable[..., TrainedRun]:
    def run(kind: str, *more: str, task: str = "image_classification") -> TrainedRun:
        cwd = tmp_path_factory.mktemp("run")
        settings = (
            f"model.path={bases(kind)}",
            f"task={task}",
            f"task.data.path={images}",
            f"lora.targets=[{','.join(KINDS[kind])}]",
            "optimizer.lr=0.02",
            "trainer.global_batch_size=8",
        )
        named = {setting.partition("=")[0] for setting in more}
        settings = (*(s for s in settings if s.partition("=")[0] not in named), *more)
        done = run_cli("train", *settings, "run.name=a", cwd=cwd)
        assert done.code == 0, done.err
        return TrainedRun(cwd / "runs" / "a", bases(kind), images, settings)

    return run


@pytest.fixture(scope="module", params=KINDS)
def trained(request: pytest.FixtureRequest, train: Callable[..., TrainedRun]) -> TrainedRun:
    return train(request.param)


def pixels(model: Path, images: Path) -> dict[str, torch.Tensor]:
    """Inputs that are made by transformers alone."""
    processor: Any = transformers.AutoImageProcessor.from_pretrained(model)
    files = sorted((images / "test").rglob("*.png"))
    return dict(processor(images=[Image.open(file) for file in files], return_tensors="pt"))


def logits(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(**inputs).logits
    return found


def test_training_lowers_the_loss_and_reports_the_files(trained: TrainedRun) -> None:
    result = trained.result
    assert set(result["adapter"]) == {"accuracy", "top5_accuracy", "macro_f1", "loss"}
    assert result["adapter"]["loss"] < 0.8 * result["base"]["loss"]
    assert result["adapter"]["accuracy"] > 0.8
    assert result["merged"] == pytest.approx(result["adapter"], abs=1e-5)
    report = json.loads((trained.path / "data_report.json").read_text())["train"]
    assert report["measures"]["width"]["mean"] == 20
    assert report["kinds"] == {"format": {"PNG": 32}, "mode": {"RGB": 32}}
    assert report["labels"] == {"blue": 16, "red": 16}
    page = (trained.path / "report.html").read_text()
    assert "Confusion matrix" in page
    assert "Kinds of files" in page


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_peft_transformers_and_onnx_say_the_same(
    trained: TrainedRun, run_cli: Any, tmp_path: Path
) -> None:
    merged, exported = tmp_path / "merged", tmp_path / "model.onnx"
    for command, output in (("merge", merged), ("export", exported)):
        done = run_cli(command, trained.path, f"output={output}", "--json", cwd=tmp_path)
        assert done.code == 0, done.err
        assert done.lines[0]["max_abs_difference"] < 1e-4
    inputs = pixels(merged, trained.data)
    auto = transformers.AutoModelForImageClassification
    base = auto.from_pretrained(trained.base, num_labels=2)
    adapter = peft.PeftModel.from_pretrained(base, trained.path / "adapter")
    assert adapter.peft_config["default"].task_type is None
    found = logits(adapter, inputs)
    plain = auto.from_pretrained(merged)
    torch.testing.assert_close(logits(plain, inputs), found, atol=1e-5, rtol=1e-4)
    assert plain.config.id2label == {0: "blue", 1: "red"}
    import onnxruntime

    session = onnxruntime.InferenceSession(str(exported), providers=["CPUExecutionProvider"])
    (theirs,) = session.run(None, {name: x.numpy() for name, x in inputs.items()})
    np.testing.assert_allclose(theirs, found.numpy(), atol=1e-4)


@pytest.fixture(scope="module")
def vit(train: Callable[..., TrainedRun]) -> TrainedRun:
    return train("vit")


def test_all_forms_have_the_same_scores(vit: TrainedRun, run_cli: Any, tmp_path: Path) -> None:
    forms = (f"merged={tmp_path / 'm'}", f"exported={tmp_path / 'm.onnx'}")
    for command, form in zip(("merge", "export"), forms, strict=True):
        output = "output=" + form.partition("=")[2]
        assert run_cli(command, vit.path, output, "check_rows=0", cwd=tmp_path).code == 0
    done = run_cli("eval", vit.path, *forms, "--json", cwd=tmp_path)
    assert done.code == 0, done.err
    for form in ("merged", "exported"):
        assert done.lines[0][form] == pytest.approx(done.lines[0]["adapter"], abs=1e-4)


def test_metrics_are_those_of_scikit_learn_on_the_predictions(
    vit: TrainedRun, run_cli: Any
) -> None:
    done = run_cli("eval", vit.path, "--json", cwd=vit.path)
    assert done.code == 0, done.err
    lines = (vit.path / "predictions" / "test.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    true, found = [row["reference"] for row in rows], [row["label"] for row in rows]
    scores = done.lines[0]["adapter"]
    assert scores["accuracy"] == metrics.accuracy_score(true, found)
    assert scores["macro_f1"] == pytest.approx(metrics.f1_score(true, found, average="macro"))
    assert {row["id"].split("/")[1] for row in rows} == {"red", "blue"}


def test_predict_reads_a_folder_a_file_and_rows(
    vit: TrainedRun, run_cli: Any, tmp_path: Path
) -> None:
    folder = vit.data / "test"
    done = run_cli("predict", vit.path, f"input={folder}", cwd=tmp_path)
    assert done.code == 0, done.err
    by_file = {line["image"]: line["label"] for line in done.lines}
    assert len(by_file) == 12
    one = run_cli("predict", vit.path, f"input={folder / 'red' / '0.png'}", cwd=tmp_path)
    assert one.lines[0]["label"] == by_file["red/0.png"]
    table = tmp_path / "rows.csv"
    with table.open("w", newline="") as file:
        csv.writer(file).writerows([["image", "note"], [folder / "red" / "0.png", "mine"]])
    rows = run_cli("predict", vit.path, f"input={table}", cwd=tmp_path)
    assert (rows.lines[0]["note"], rows.lines[0]["label"]) == ("mine", by_file["red/0.png"])
    content = (folder / "red" / "0.png").read_bytes()
    pq.write_table(
        pa.table({"image": [{"bytes": content, "path": "0.png"}]}), tmp_path / "r.parquet"
    )
    held = run_cli("predict", vit.path, f"input={tmp_path / 'r.parquet'}", cwd=tmp_path)
    assert held.lines[0]["probabilities"] == rows.lines[0]["probabilities"]
    assert held.lines[0]["image"] == {"path": "0.png"}


def test_a_text_is_no_image(vit: TrainedRun, run_cli: Any, tmp_path: Path) -> None:
    done = run_cli("predict", vit.path, "text=a red car", cwd=tmp_path)
    assert done.code == 2
    assert "`text` must be left out with an adapter for image_classification" in done.err


def test_a_broken_file_ends_a_prediction(vit: TrainedRun, run_cli: Any, tmp_path: Path) -> None:
    shutil.copy(vit.data / "test" / "red" / "0.png", tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no image")
    done = run_cli("predict", vit.path, f"input={tmp_path}", cwd=tmp_path)
    assert done.code == 1
    assert len(done.lines) == 1
    assert "b.png (no image of a known format)" in done.err


def test_files_that_are_broken_or_missing_are_told_together(
    vit: TrainedRun, run_cli: Any, images: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(images, folder)
    whole = (folder / "train" / "red" / "0.png").read_bytes()
    for number in range(0, 24, 2):
        (folder / "train" / "red" / f"{number}.png").write_bytes(whole[:200])
    (folder / "validation" / "blue" / "1.png").write_bytes(b"no image")
    settings = [s for s in vit.settings if not s.startswith("task.data.path")]
    data = f"task.data.path={folder}"
    done = run_cli("train", *settings, data, "run.name=b", cwd=tmp_path)
    assert done.code == 2
    assert done.err.count("error[data.bad-image]") == 1
    assert "but 13 cannot be" in done.err
    assert f"{folder}/train/red/0.png (" in done.err
    assert "and 3 more" in done.err
    assert not (tmp_path / "runs").exists()
    rows = [["image", "label"], ["gone.png", "red"], [images / "train/blue/1.png", "blue"]]
    with (tmp_path / "train.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    data = f"task.data.path={tmp_path / 'train.csv'}"
    done = run_cli("train", *settings, data, "run.name=b", cwd=tmp_path)
    assert done.code == 2
    assert "gone.png of" in done.err
    assert "(no such file or directory)" in done.err
    assert not (tmp_path / "runs").exists()


def test_a_label_of_validation_alone_is_refused(
    vit: TrainedRun, run_cli: Any, images: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(images, folder)
    (folder / "validation" / "red").rename(folder / "validation" / "green")
    settings = [s for s in vit.settings if not s.startswith("task.data.path")]
    done = run_cli("train", *settings, f"task.data.path={folder}", "run.name=b", cwd=tmp_path)
    assert done.code == 2
    assert "must be a label that train has" in done.err


def test_a_base_without_a_processor_is_refused(
    vit: TrainedRun, run_cli: Any, bases: Callable[[str], Path], tmp_path: Path
) -> None:
    shutil.copytree(bases("vit"), tmp_path / "base")
    (tmp_path / "base" / "preprocessor_config.json").unlink()
    settings = [s for s in vit.settings if not s.startswith("model.path")]
    model = f"model.path={tmp_path / 'base'}"
    done = run_cli("train", *settings, model, "run.name=b", cwd=tmp_path)
    assert done.code == 2
    assert "error[model.no-image-processor]" in done.err


def test_another_processor_is_another_base(
    vit: TrainedRun, run_cli: Any, bases: Callable[[str], Path], tmp_path: Path
) -> None:
    shutil.copytree(bases("vit"), tmp_path / "base")
    file = tmp_path / "base" / "preprocessor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "image_mean": [0.1, 0.1, 0.1]}))
    done = run_cli("eval", vit.path, f"base={tmp_path / 'base'}", cwd=tmp_path)
    assert done.code == 2
    assert "another preprocessor_config.json" in done.err


def test_a_resumed_run_is_bit_equal(train: Callable[..., TrainedRun], run_cli: Any) -> None:
    """Though what is drawn for an image differs from step to step."""
    more = ("trainer.save_steps=2", "trainer.eval_steps=6", "task.augmentation.rand_augment=1")
    whole = train("vit", *more, "trainer.max_steps=6", "trainer.keep_checkpoints=4")
    weights = whole.path / "adapter" / "adapter_model.safetensors"
    expected = weights.read_bytes()
    for step in (4, 6):
        shutil.rmtree(whole.path / "checkpoints" / f"step-{step:08d}")
    arguments = (*whole.settings, "run.name=a", "--resume", "--json")
    done = run_cli("train", *arguments, cwd=whole.path.parent.parent)
    assert done.code == 0, done.err
    assert "resuming after step 2" in done.err
    assert weights.read_bytes() == expected


def test_changes_of_training_images_change_what_is_learned(
    train: Callable[..., TrainedRun],
) -> None:
    plain = ("crop_scale=1", "flip=0", "color_jitter=0")
    off = tuple(f"task.augmentation.{setting}" for setting in plain)
    losses = [
        train("vit", "trainer.max_steps=2", *more).result["adapter"]["loss"] for more in ((), off)
    ]
    assert losses[0] != losses[1]


def test_any_number_of_labels(run_cli: Any, bases: Callable[[str], Path], tmp_path: Path) -> None:
    draw, rows = random.Random(1), []
    for number in range(48):
        has = {"red": number % 2, "wide": number // 2 % 2}
        size = (40, 12) if has["wide"] else (12, 40)
        picture = striped("red" if has["red"] else "blue", draw, size=size)
        (tmp_path / f"{number}.png").write_bytes(png(picture))
        rows.append({"image": f"{number}.png", **has})
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "rows.jsonl").write_text(text)
    done = run_cli(
        *("train", f"model.path={bases('vit')}", "task=image_multi_label", "--json"),
        *("task.data.path=rows.jsonl", "task.data.label_columns=[red,wide]", "run.name=a"),
        *("optimizer.lr=0.02", "trainer.epochs=4", "trainer.global_batch_size=8"),
        cwd=tmp_path,
    )
    assert done.code == 0, done.err
    assert set(done.lines[0]["adapter"]) == {"micro_f1", "macro_f1", "exact_match", "loss"}
    assert done.lines[0]["adapter"]["loss"] < done.lines[0]["base"]["loss"]
    again = run_cli("predict", "runs/a", "input=0.png", cwd=tmp_path)
    assert set(again.lines[0]["probabilities"]) == {"red", "wide"}

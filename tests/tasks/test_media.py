"""Rows with files: what is kept of them, and how much memory that takes."""

import random
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny_vision import png, write_image_folder, write_tiny_vision

from lora_cli import packages
from lora_cli.config.media import ImageClassificationConfig
from lora_cli.config.tasks import DataConfig
from lora_cli.data.media import UnreadableError
from lora_cli.data.types import Row
from lora_cli.errors import UserError
from lora_cli.models.processors import load_processor
from lora_cli.models.sources import resolve_model
from lora_cli.tasks.heads import load_with_head
from lora_cli.tasks.image_classification import ImageClassification

FAMILY = ImageClassification()


def config(path: Path, **data: Any) -> ImageClassificationConfig:
    return ImageClassificationConfig(data=DataConfig(path=str(path), **data))


def test_loading_looks_files_up_and_opens_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_image_folder(tmp_path)
    (tmp_path / "train" / "red" / "0.png").write_bytes(b"no image")
    monkeypatch.setattr(Path, "read_bytes", None)
    splits = FAMILY.load(config(tmp_path), seed=0)
    assert {name: len(rows) for name, rows in splits.rows.items()} == {
        "train": 32,
        "validation": 12,
        "test": 12,
    }
    first = splits.rows["train"][0]
    assert first.id == "train/blue/1.png"
    assert first.values["image"]["file"] == str(tmp_path / first.id)
    assert splits.state["labels"] == ["blue", "red"]


def test_missing_files_of_all_splits_are_one_error(tmp_path: Path) -> None:
    for split, count in (("train", 9), ("validation", 4)):
        text = "".join(f"{split}-{n}.png,{'ab'[n % 2]}\n" for n in range(count))
        (tmp_path / f"{split}.csv").write_text("image,label\n" + text)
    with pytest.raises(UnreadableError) as caught:
        FAMILY.load(config(tmp_path), seed=0)
    (problem,) = caught.value.problems
    assert "13 cannot be" in problem.message
    assert (problem.where or "").endswith("and 3 more")


def test_other_columns_are_named(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("picture,label\na.png,x\n")
    with pytest.raises(UserError, match=r"image_column. must name the column"):
        FAMILY.load(config(tmp_path / "train.csv"), seed=0)


def test_a_row_to_predict_must_have_its_file(tmp_path: Path) -> None:
    state = {"columns": {"image": "image", "label": None}, "labels": ["a", "b"], "numbered": False}
    with pytest.raises(UserError, match="one cannot be"):
        FAMILY.check_row(Row("1", {"image": "gone.png"}, f"{tmp_path}/", 1), state)


def test_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError) as caught:
        FAMILY.load(config(tmp_path), seed=0)
    assert caught.value.problems[0].fix == 'pip install "lora-cli[vision]"'


@pytest.fixture(scope="module")
def bound(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return model and task, in a number format other than that of the images."""
    folder = tmp_path_factory.mktemp("vit")
    write_tiny_vision(folder, "vit", dtype="bfloat16")
    state = {"columns": {"image": "image", "label": None}, "labels": ["a", "b"], "numbered": False}
    source = resolve_model(str(folder), processor="image processor")
    model = load_with_head(source, FAMILY, state, dtype="auto", seed=0).model
    processor = load_processor(source, "image processor")
    return model, FAMILY.build(ImageClassificationConfig(), state, processor)


def test_inputs_have_the_number_format_of_the_model(bound: Any, tmp_path: Path) -> None:
    model, task = bound
    write_image_folder(tmp_path, train=2, test=0)
    row = Row("1", {"image": "train/red/0.png"}, f"{tmp_path}/", 1)
    output = task.forward(model, task.collate([task.encode(row)]))
    assert model.dtype == torch.bfloat16
    assert output.outputs["logits"].dtype == torch.float32
    assert bool(output.outputs["logits"].isfinite().all())


def test_memory_does_not_grow_with_the_images(bound: Any, tmp_path: Path) -> None:
    """40 images of 1.2 MB each, decoded, are encoded and put into batches in the room of two."""
    _, task = bound
    for number in range(40):
        image = Image.new("RGB", (640, 640), (number, random.Random(number).randrange(256), 0))
        (tmp_path / f"{number}.png").write_bytes(png(image))
    rows = [Row(str(n), {"image": f"{n}.png"}, f"{tmp_path}/", n) for n in range(40)]
    task.encode(rows[0])
    tracemalloc.start()
    features = [task.encode(row) for row in rows]
    batches = [task.collate(features[start : start + 4]) for start in range(0, 40, 4)]
    kept, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(batches) == 10
    assert kept < 200_000
    assert most < 2 * 640 * 640 * 3

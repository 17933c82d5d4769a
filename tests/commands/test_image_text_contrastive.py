"""Images with captions through every command, on tiny dual encoders and eight coloured squares."""

import csv
import json
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
from tiny_vision import COLOURS, write_captioned, write_tiny_pairs
from trained_run import TrainedRun

RECALLS = {
    f"{side}_recall_at_{k}" for side in ("image_to_text", "text_to_image") for k in (1, 5, 10)
}
CAPTIONS = [f"a {colour} square" for colour in COLOURS]


@pytest.fixture(scope="module")
def squares(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_captioned(tmp_path_factory.mktemp("squares"))


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind)
            write_tiny_pairs(made[kind], kind, captions=CAPTIONS)
        return made[kind]

    return make


@pytest.fixture(scope="module")
def train(
    run_cli: Any, squares: Path, bases: Callable[[str], Path], tmp_path_factory: Any
) -> Callable[..., TrainedRun]:
    def run(kind: str, *more: str) -> TrainedRun:
        cwd = tmp_path_factory.mktemp("run")
        settings = (
            f"model.path={bases(kind)}",
            "task=image_text_contrastive",
            f"task.data.path={squares}",
            "task.max_length=16",
            "lora=all-linear",
            "optimizer.lr=0.02",
            "trainer.max_steps=40",
            "trainer.eval_steps=20",
            "trainer.global_batch_size=8",
        )
        named = {setting.partition("=")[0] for setting in more}
        settings = (*(s for s in settings if s.partition("=")[0] not in named), *more)
        done = run_cli("train", *settings, "run.name=a", cwd=cwd)
        assert done.code == 0, done.err
        return TrainedRun(cwd / "runs" / "a", bases(kind), squares, settings)

    return run


@pytest.fixture(scope="module", params=["clip", "siglip"])
def trained(request: pytest.FixtureRequest, train: Callable[..., TrainedRun]) -> TrainedRun:
    return train(request.param)


def test_eight_squares_and_their_captions_find_each_other(trained: TrainedRun) -> None:
    result = trained.result
    assert set(result["adapter"]) == {*RECALLS, "mean_recall", "loss"}
    assert result["base"]["mean_recall"] < 0.8
    assert result["adapter"]["mean_recall"] == 1
    assert result["adapter"]["loss"] < 0.3 * result["base"]["loss"]


def inputs(model: Path, data: Path) -> Any:
    """Inputs that are made by transformers alone, padded as either model was trained."""
    processor: Any = transformers.AutoProcessor.from_pretrained(model)
    sigmoid = isinstance(processor, transformers.SiglipProcessor)
    images = [Image.open(data / "test" / f"{colour}-0.png") for colour in COLOURS]
    padding = {"padding": "max_length", "max_length": 16} if sigmoid else {"padding": True}
    return processor(images=images, text=CAPTIONS, return_tensors="pt", **padding)


def similarities(model: Any, given: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(**given).logits_per_image
    return found


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_peft_transformers_and_onnx_say_the_same(
    trained: TrainedRun, run_cli: Any, tmp_path: Path
) -> None:
    merged, exported = tmp_path / "merged", tmp_path / "model.onnx"
    for command, output in (("merge", merged), ("export", exported)):
        done = run_cli(command, trained.path, f"output={output}", "--json", cwd=tmp_path)
        assert done.code == 0, done.err
        assert done.lines[0]["max_abs_difference"] < 1e-4
    given = inputs(merged, trained.data)
    base = transformers.AutoModel.from_pretrained(trained.base)
    adapter = peft.PeftModel.from_pretrained(base, trained.path / "adapter")
    assert adapter.peft_config["default"].task_type is None
    found = similarities(adapter, given)
    plain = transformers.AutoModel.from_pretrained(merged)
    torch.testing.assert_close(similarities(plain, given), found, atol=1e-4, rtol=1e-4)
    forms = (f"merged={merged}", f"exported={exported}")
    done = run_cli("eval", trained.path, *forms, "--json", cwd=tmp_path)
    assert done.code == 0, done.err
    for form in ("merged", "exported"):
        assert done.lines[0][form] == pytest.approx(done.lines[0]["adapter"], abs=1e-4)
    with torch.no_grad():
        loss = plain(**given, return_loss=True).loss.item()
    assert done.lines[0]["adapter"]["loss"] == pytest.approx(loss, abs=1e-4)
    import onnxruntime

    session = onnxruntime.InferenceSession(str(exported), providers=["CPUExecutionProvider"])
    names = [argument.name for argument in session.get_inputs()]
    # As many images as one likes, with as many texts.
    fewer = {**given, "pixel_values": given["pixel_values"][:5]}
    (theirs,) = session.run(["logits_per_image"], {name: fewer[name].numpy() for name in names})
    np.testing.assert_allclose(theirs, found[:5].numpy(), atol=1e-3)

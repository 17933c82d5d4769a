"""Chat with images through every command, on tiny models and squares of one colour."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from PIL import Image
from tiny_image_chat import VIDEOS, square, write_squares, write_tiny_image_chat
from trained_run import TrainedRun

from lora_cli.models.image_chat import ImageChatProcessor

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")


@pytest.fixture(scope="module")
def squares(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_squares(tmp_path_factory.mktemp("squares"))


@pytest.fixture(scope="module")
def train(
    run_cli: Any, squares: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], TrainedRun]:
    made: dict[str, TrainedRun] = {}

    def run(kind: str) -> TrainedRun:
        if kind not in made:
            base, cwd = tmp_path_factory.mktemp(kind), tmp_path_factory.mktemp("run")
            write_tiny_image_chat(base, kind)
            settings = (
                *(f"model.path={base}", "task=image_chat", f"task.data.path={squares}"),
                *("task.generate_in_eval=true", "task.generation.max_new_tokens=8"),
                *("lora.targets=[*language_model.*_proj]", "optimizer.lr=0.02"),
                *("trainer.epochs=8", "trainer.global_batch_size=8", "trainer.eval_steps=48"),
            )
            done = run_cli("train", *settings, "run.name=a", cwd=cwd)
            assert done.code == 0, done.err
            made[kind] = TrainedRun(cwd / "runs" / "a", base, squares, settings)
        return made[kind]

    return run


@pytest.fixture(scope="module", params=["llava", "qwen2_vl"])
def trained(request: pytest.FixtureRequest, train: Callable[[str], TrainedRun]) -> TrainedRun:
    return train(request.param)


def inputs_of(folder: Path, image: Path) -> dict[str, Any]:
    processor = ImageChatProcessor.from_pretrained(folder)
    asked = {"type": "text", "text": "what colour is it ?"}
    parts = [{"type": "image", "image": Image.open(image)}, asked]
    return dict(
        processor.apply_chat_template(
            [{"role": "user", "content": parts}], add_generation_prompt=True, tokenize=True,
            return_dict=True, return_tensors="pt",
        )
    )  # fmt: skip


def test_colours_are_learned(trained: TrainedRun) -> None:
    result = trained.result
    base, adapter = result["base"], result["adapter"]
    assert base["exact_match"] == 0
    assert adapter["exact_match"] == adapter["token_accuracy"] == 1
    assert adapter["loss"] < 0.2 * base["loss"]
    assert result["merged"]["loss"] == pytest.approx(adapter["loss"], abs=1e-4)
    report = json.loads((trained.path / "data_report.json").read_text())["train"]
    assert report["measures"]["images"]["most"] == 2
    assert report["kinds"]["format"] == {"PNG": 48}
    adapted = peft.load_peft_weights(str(trained.path / "adapter"))
    assert adapted
    assert all("language_model" in name for name in adapted)


def test_peft_and_plain_transformers_say_the_same(
    trained: TrainedRun, run_cli: Any, tmp_path: Path
) -> None:
    merged = tmp_path / "merged"
    done = run_cli("merge", trained.path, f"output={merged}", "--json", cwd=tmp_path)
    assert done.code == 0, done.err
    assert done.lines[0]["max_abs_difference"] < 1e-4
    auto = transformers.AutoModelForImageTextToText
    adapter = peft.PeftModel.from_pretrained(
        auto.from_pretrained(trained.base), trained.path / "adapter"
    ).eval()
    assert adapter.peft_config["default"].task_type is None
    plain = auto.from_pretrained(merged).eval()
    image = trained.data / "test-0-0.png"
    inputs = inputs_of(merged, image)
    same = inputs_of(trained.base, image)
    assert inputs["input_ids"].tolist() == same["input_ids"].tolist()
    with torch.no_grad():
        found, expected = plain(**inputs).logits, adapter(**inputs).logits
        before = auto.from_pretrained(trained.base).eval()(**inputs).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert float((found - before).abs().max()) > 0.1
    # What says how videos are read comes along, for those who have torchvision.
    for folder in (trained.base, merged):
        kept = folder / "video_preprocessor_config.json"
        assert kept.is_file() == ("qwen" in trained.base.name)
        assert not kept.is_file() or json.loads(kept.read_text()) == VIDEOS


def test_rows_are_answered(trained: TrainedRun, run_cli: Any, tmp_path: Path) -> None:
    for name in ("red", "blue"):
        (tmp_path / f"{name}.png").write_bytes(square(name, random.Random(5)))
    rows: list[dict[str, Any]] = [
        {"image": "red.png", "question": "what colour is it ?", "who": 1},
        {
            "images": ["red.png", "blue.png"],
            "messages": [
                {"role": "user", "content": "<image> what colour is it ?"},
                {"role": "assistant", "content": "it is red"},
                {"role": "user", "content": "<image>\nand this ?"},
            ],
        },
    ]
    for row, answer in zip(rows, ("it is red", "it is blue"), strict=True):
        (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
        done = run_cli("predict", trained.path, "input=rows.jsonl", cwd=tmp_path)
        assert done.code == 0, done.err
        (line,) = done.lines
        assert (line["answer"], line["ended"], line.get("who")) == (answer, True, row.get("who"))


def test_bytes_in_lists_of_a_parquet_file(
    train: Callable[[str], TrainedRun], run_cli: Any, tmp_path: Path
) -> None:
    run = train("llava")
    rows = []
    for line in (run.data / "test.jsonl").read_text().splitlines():
        row = json.loads(line)
        images = [{"bytes": (run.data / n).read_bytes(), "path": n} for n in row["images"]]
        rows.append({**row, "images": images})
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "test.parquet")
    done = run_cli("eval", run.path, "task.data.path=test.parquet", "--json", cwd=tmp_path)
    assert done.code == 0, done.err
    plain = run_cli("eval", run.path, "split=test", "--json", cwd=tmp_path)
    assert done.lines[0]["adapter"] == pytest.approx(plain.lines[0]["adapter"])
    done = run_cli("predict", run.path, "input=test.parquet", cwd=tmp_path)
    assert done.code == 0, done.err
    assert "bytes" not in done.lines[0]["images"][0]


def test_what_it_is_not_for(
    train: Callable[[str], TrainedRun], run_cli: Any, tmp_path: Path
) -> None:
    run = train("llava")
    done = run_cli("export", run.path, "format=onnx", "output=a.onnx", cwd=tmp_path)
    assert (done.code, "error[export.no-onnx]" in done.err) == (2, True)
    done = run_cli("chat", run.path, cwd=tmp_path, stdin=b"hello\n")
    assert (done.code, "error[chat.other-task]" in done.err) == (2, True)
    assert "input=FILE" in done.err
    done = run_cli("predict", run.path, "text=hello", cwd=tmp_path)
    assert (done.code, "error[predict.no-text]" in done.err) == (2, True)
    done = run_cli("predict", run.path, f"input={run.data / 'test-0-0.png'}", cwd=tmp_path)
    assert (done.code, "error[data.missing-column]" in done.err) == (2, True)


def test_broken_images_are_told_of_together(
    train: Callable[[str], TrainedRun], run_cli: Any, tmp_path: Path
) -> None:
    run = train("llava")
    data = shutil.copytree(run.data, tmp_path / "data")
    for name in ("train-0-0.png", "validation-3-0.png"):
        (data / name).write_bytes((data / name).read_bytes()[:60])
    settings = [s for s in run.settings if "data.path" not in s]
    done = run_cli("train", *settings, f"task.data.path={data}", "run.name=b", cwd=tmp_path)
    assert done.code == 2
    assert done.err.count("error[") == 1
    assert "train-0-0.png" in done.err
    assert "validation-3-0.png" in done.err
    assert not (tmp_path / "runs").exists()


def test_the_vision_tower_can_be_adapted_too(
    train: Callable[[str], TrainedRun], run_cli: Any, tmp_path: Path
) -> None:
    run = train("qwen2_vl")
    shown = run_cli("targets", f"model.path={run.base}", "task=image_chat", cwd=tmp_path)
    assert "*language_model.*.q_proj: 2 layers" in shown.out + shown.err
    assert "trained whole: nothing" in shown.out + shown.err
    settings = [s for s in run.settings if not s.startswith(("lora", "task.gen", "trainer.ep"))]
    more = ("lora.targets=[qkv,*language_model.*.q_proj]", "trainer.max_steps=2", "run.name=b")
    done = run_cli("train", *settings, *more, cwd=tmp_path)
    assert done.code == 0, done.err
    adapted = peft.load_peft_weights(str(tmp_path / "runs" / "b" / "adapter"))
    assert any("visual" in name for name in adapted)


def test_named_models_and_data_are_tried_without_the_hub(run_cli: Any, tmp_path: Path) -> None:
    more = ("model.num_layers=2", "smoke=true")
    done = run_cli("train", "model=qwen2-vl-2b", "task=vqa_rad", *more, cwd=tmp_path)
    assert done.code == 0, done.err
    assert "an image chat processor made for these rows" in done.out + done.err

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
from safetensors import safe_open
from sklearn.metrics import accuracy_score
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
def test_peft_and_transformers_say_the_same(
    trained: TrainedRun, run_cli: Any, tmp_path: Path
) -> None:
    merged = tmp_path / "merged"
    done = run_cli("merge", trained.path, f"output={merged}", "--json", cwd=tmp_path)
    assert done.code == 0, done.err
    assert done.lines[0]["max_abs_difference"] < 1e-4
    given = inputs(merged, trained.data)
    base = transformers.AutoModel.from_pretrained(trained.base)
    adapter = peft.PeftModel.from_pretrained(base, trained.path / "adapter")
    assert adapter.peft_config["default"].task_type is None
    found = similarities(adapter, given)
    plain = transformers.AutoModel.from_pretrained(merged)
    torch.testing.assert_close(similarities(plain, given), found, atol=1e-4, rtol=1e-4)
    done = run_cli("eval", trained.path, f"merged={merged}", "--json", cwd=tmp_path)
    assert done.code == 0, done.err
    scores = done.lines[0]["adapter"]
    assert done.lines[0]["merged"] == pytest.approx(scores, abs=1e-4)
    with torch.no_grad():
        loss = plain(**given, return_loss=True).loss.item()
    assert scores["loss"] == pytest.approx(loss, abs=1e-4)
    lines = (trained.path / "predictions" / "test.jsonl").read_text().splitlines()
    with torch.no_grad():
        out = plain(**given)
    cosines = (out.image_embeds * out.text_embeds).sum(-1).tolist()
    assert [json.loads(line)["similarity"] for line in lines] == pytest.approx(cosines, abs=1e-5)


@pytest.mark.parametrize("kind", ["clip", pytest.param("siglip", marks=pytest.mark.slow)])
def test_onnx_takes_any_number_of_images_and_texts(
    kind: str, train: Callable[..., TrainedRun], run_cli: Any, tmp_path: Path
) -> None:
    run = train(kind, "trainer.max_steps=2")
    exported, merged = tmp_path / "model.onnx", tmp_path / "merged"
    for command, output in (("export", exported), ("merge", merged)):
        done = run_cli(command, run.path, f"output={output}", "check_rows=8", cwd=tmp_path)
        assert done.code == 0, done.err
    done = run_cli("eval", run.path, f"exported={exported}", "--json", cwd=tmp_path)
    assert done.lines[0]["exported"] == pytest.approx(done.lines[0]["adapter"], abs=1e-4)
    import onnxruntime

    session = onnxruntime.InferenceSession(str(exported), providers=["CPUExecutionProvider"])
    given = inputs(merged, run.data)
    fewer = {**given, "pixel_values": given["pixel_values"][:5]}
    names = [argument.name for argument in session.get_inputs()]
    (theirs,) = session.run(["logits_per_image"], {name: fewer[name].numpy() for name in names})
    expected = similarities(transformers.AutoModel.from_pretrained(merged), fewer)
    assert expected.shape == (5, 8)
    np.testing.assert_allclose(theirs, expected.numpy(), atol=1e-3)


@pytest.fixture(scope="module")
def clip(train: Callable[..., TrainedRun]) -> TrainedRun:
    return train("clip")


LABELS = f"zero_shot.labels=[{','.join(COLOURS)}]"
PROMPT = "zero_shot.prompt=a {} square"


def test_labels_that_were_not_trained_on_before_and_after(clip: TrainedRun, run_cli: Any) -> None:
    rows = (f"task.data.path={clip.data}", "task.data.label_column=colour", "split=test")
    done = run_cli("eval", clip.path, *rows, LABELS, PROMPT, "--json", cwd=clip.path)
    assert done.code == 0, done.err
    scores = done.lines[0]
    assert scores["base"]["zero_shot_accuracy"] < scores["adapter"]["zero_shot_accuracy"] == 1
    file = clip.path / "predictions" / f"{clip.data.name}-test.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    true, found = [line["reference"] for line in lines], [line["label"] for line in lines]
    assert accuracy_score(true, found) == scores["adapter"]["zero_shot_accuracy"]


def test_folders_of_labels_need_no_captions(clip: TrainedRun, run_cli: Any, tmp_path: Path) -> None:
    for colour in COLOURS:
        (tmp_path / "by" / colour).mkdir(parents=True)
        shutil.copy(clip.data / "test" / f"{colour}-0.png", tmp_path / "by" / colour / "0.png")
    rows = (f"task.data.path={tmp_path / 'by'}", "task.data.label_column=label")
    done = run_cli("eval", clip.path, *rows, LABELS, PROMPT, "--json", cwd=tmp_path)
    assert done.code == 0, done.err
    assert done.lines[0]["adapter"] == {"zero_shot_accuracy": 1}
    refused = run_cli("eval", clip.path, *rows, "zero_shot.labels=[red,blue]", cwd=tmp_path)
    assert refused.code == 2
    assert "must be one of `zero_shot.labels`" in refused.err
    refused = run_cli("eval", clip.path, *rows, cwd=tmp_path)
    assert refused.code == 2
    assert "error[data.no-zero-shot]" in refused.err


def test_predict_gives_images_labels(clip: TrainedRun, run_cli: Any, tmp_path: Path) -> None:
    folder = clip.data / "test"
    done = run_cli("predict", clip.path, f"input={folder}", LABELS, PROMPT, cwd=tmp_path)
    assert done.code == 0, done.err
    assert [line["id"].partition("-")[0] for line in done.lines] == sorted(COLOURS)
    assert all(line["id"].startswith(line["label"]) for line in done.lines)
    assert sum(done.lines[0]["probabilities"].values()) == pytest.approx(1)
    done = run_cli("predict", clip.path, f"input={folder}", cwd=tmp_path)
    assert done.code == 2
    assert "error[data.nothing-to-compare]" in done.err


def test_predict_compares_images_with_their_captions(
    clip: TrainedRun, run_cli: Any, tmp_path: Path
) -> None:
    place = {name: str(clip.data / "test" / f"{name}-0.png") for name in ("red", "blue")}
    rows = [["image", "caption"], [place["red"], "a red square"], [place["red"], "a blue square"]]
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    done = run_cli("predict", clip.path, "input=rows.csv", cwd=tmp_path)
    assert done.code == 0, done.err
    right, wrong = (line["similarity"] for line in done.lines)
    assert right > wrong + 0.2
    content = Path(place["red"]).read_bytes()
    table = pa.table({"image": [{"bytes": content, "path": "0.png"}], "caption": ["a red square"]})
    pq.write_table(table, tmp_path / "rows.parquet")
    held = run_cli("predict", clip.path, "input=rows.parquet", cwd=tmp_path)
    assert held.lines[0]["similarity"] == pytest.approx(right, abs=1e-6)


def test_bytes_with_lists_of_captions_are_trained_on(
    train: Callable[..., TrainedRun], squares: Path, tmp_path: Path
) -> None:
    """A caption that stands twice in train, and any of those of an image, count as right."""
    cells = [{"bytes": (squares / "train" / f"{c}-0.png").read_bytes(), "path": c} for c in COLOURS]
    captions = [[f"a {colour} square", f"{colour}"] for colour in COLOURS]
    pq.write_table(pa.table({"image": cells, "captions": captions}), tmp_path / "train.parquet")
    run = train(
        "clip",
        f"task.data.path={tmp_path / 'train.parquet'}",
        "task.data.validation_split=0.25",
        "trainer.max_steps=2",
    )
    report = json.loads((run.path / "data_report.json").read_text())
    assert (report["train"]["rows"], report["validation"]["rows"]) == (12, 4)
    lines = (run.path / "predictions" / "validation.jsonl").read_text().splitlines()
    ids = [json.loads(line)["id"] for line in lines]
    assert len({row_id.partition("#")[0] for row_id in ids}) == 2


def test_one_half_alone_is_adapted(train: Callable[..., TrainedRun]) -> None:
    run = train("clip", "lora.targets=[vision_model*_proj]", "lora=default", "trainer.max_steps=2")
    with safe_open(run.path / "adapter" / "adapter_model.safetensors", "pt") as stored:
        names = list(stored.keys())
    assert names
    assert all("vision_model" in name for name in names)


def test_every_weight_holds_the_scale_too(train: Callable[..., TrainedRun], run_cli: Any) -> None:
    run = train("siglip", "strategy=full", "lora=default", "trainer.max_steps=2")
    done = run_cli("merge", run.path, "output=merged", cwd=run.path)
    assert done.code == 0, done.err
    before, after = (
        transformers.AutoModel.from_pretrained(folder) for folder in (run.base, run.path / "merged")
    )
    for name in ("logit_scale", "logit_bias"):
        assert getattr(before, name).item() != getattr(after, name).item()


def test_a_resumed_run_is_bit_equal(train: Callable[..., TrainedRun], run_cli: Any) -> None:
    whole = train("clip", "trainer.save_steps=2", "trainer.eval_steps=4", "trainer.max_steps=4")
    weights = whole.path / "adapter" / "adapter_model.safetensors"
    expected = weights.read_bytes()
    shutil.rmtree(whole.path / "checkpoints" / "step-00000004")
    arguments = (*whole.settings, "run.name=a", "--resume", "--json")
    done = run_cli("train", *arguments, cwd=whole.path.parent.parent)
    assert done.code == 0, done.err
    assert "resuming after step 2" in done.err
    assert weights.read_bytes() == expected
    more = ("trainer.micro_batch_size=4", "run.name=a", "--resume")
    done = run_cli("train", *whole.settings, *more, cwd=whole.path.parent.parent)
    assert done.code == 2, "fewer rows in memory are another loss"
    assert "trainer.micro_batch_size" in done.err


def refused(clip: TrainedRun, run_cli: Any, cwd: Path, *more: str) -> str:
    """Return the error of a run with other settings, of which nothing was written."""
    named = {setting.partition("=")[0] for setting in more}
    settings = [one for one in clip.settings if one.partition("=")[0] not in named]
    done = run_cli("train", *settings, *more, "run.name=b", cwd=cwd)
    assert done.code == 2
    assert not (cwd / "runs").exists()
    error: str = done.err
    return error


def test_rows_that_cannot_be_used_are_refused(
    clip: TrainedRun, run_cli: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(clip.data, folder)
    whole = (folder / "train" / "red-0.png").read_bytes()
    (folder / "train" / "red-0.png").write_bytes(whole[:60])
    error = refused(clip, run_cli, tmp_path, f"task.data.path={folder}")
    assert "error[data.bad-image]" in error
    assert "train/red-0.png (" in error
    (folder / "train" / "red-0.png").write_bytes(whole)
    metadata = folder / "train" / "metadata.jsonl"
    lines = metadata.read_text()
    metadata.write_text(lines.replace("a red square", " "))
    error = refused(clip, run_cli, tmp_path, f"task.data.path={folder}")
    assert "`text` must hold a text in every row, but is empty in 1 row" in error
    for split in ("train", "validation", "test"):
        file = folder / split / "metadata.jsonl"
        file.write_text(lines.replace('"text"', '"words"'))
    error = refused(clip, run_cli, tmp_path, f"task.data.path={folder}")
    assert "`task.data.caption_column` must name the column with the caption" in error
    assert "image, words, colour" in error


def test_models_and_settings_that_do_not_fit_are_refused(
    clip: TrainedRun, run_cli: Any, bases: Callable[[str], Path], tmp_path: Path
) -> None:
    error = refused(clip, run_cli, tmp_path, "task.max_length=40")
    assert "`task.max_length` must be at most 16" in error
    shutil.copytree(bases("clip"), tmp_path / "mixed")
    for file in ("processor_config.json", "tokenizer_config.json"):
        shutil.copy(bases("siglip") / file, tmp_path / "mixed" / file)
    error = refused(clip, run_cli, tmp_path, f"model.path={tmp_path / 'mixed'}")
    assert "this CLIPModel comes with a SiglipProcessor" in error
    error = refused(clip, run_cli, tmp_path, "task.zero_shot.prompt=a square")
    assert "`task.zero_shot.prompt` must have one {} for the label" in error

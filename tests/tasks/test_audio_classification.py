"""Audio classification through every command, on tones, beside peft, transformers and sklearn."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import soundfile
import soxr
import torch
import transformers
from sklearn.metrics import accuracy_score, f1_score
from tiny_sounds import WHISPER, build, tone, wav, write_folder, write_model

from lora_cli.artifacts.exporters.onnx import OnnxModel
from lora_cli.models.sound_windows import cut_model

# peft 0.21 asks for what transformers 5 has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


@pytest.fixture(scope="module", params=["wav2vec2", "whisper"])
def run(
    request: pytest.FixtureRequest, run_cli: Any, tmp_path_factory: pytest.TempPathFactory
) -> Any:
    folder = tmp_path_factory.mktemp(request.param)
    base = write_model(folder / "base", request.param)
    data = write_folder(folder / "data")
    finished = run_cli(
        *("train", "task=audio_classification", f"task.data.path={data}", f"model.path={base}"),
        *("trainer.epochs=6", "trainer.global_batch_size=8", "optimizer.lr=0.01"),
        *("task.augmentation.gain=3", f"run.dir={folder / 'run'}"),
        cwd=folder,
    )
    assert finished.code == 0, finished.err
    return SimpleNamespace(
        name=request.param, folder=folder, base=base, path=folder / "run", said=finished.err
    )


@pytest.fixture(scope="module")
def merged(run: Any, run_cli: Any) -> Any:
    finished = run_cli("merge", run.path, f"output={run.path / 'merged'}", cwd=run.folder)
    assert finished.code == 0, finished.err
    auto = transformers.AutoModelForAudioClassification
    return auto.from_pretrained(run.path / "merged").eval()


def predictions(run: Any) -> list[dict[str, Any]]:
    text = (run.path / "predictions" / "validation.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def logits_of(model: Any, run: Any, name: str) -> torch.Tensor:
    """What a plain model of transformers says of a sound, with the files of the merged folder."""
    process = transformers.AutoFeatureExtractor.from_pretrained(run.path / "merged")
    samples, rate = soundfile.read(run.folder / "data" / name, dtype="float32")
    inputs = process(soxr.resample(samples, rate, 16000), sampling_rate=16000, return_tensors="pt")
    with torch.no_grad():
        found: torch.Tensor = model(**inputs).logits[0]
    return found


def test_training_learns_and_tells_of_the_sounds(run: Any) -> None:
    result = json.loads((run.path / "result.json").read_text())
    assert set(result["adapter"]) >= {"accuracy", "macro_f1", "loss"}
    assert result["adapter"]["loss"] < 0.8 * result["base"]["loss"]
    report = json.loads((run.path / "data_report.json").read_text())["train"]
    assert report["measures"]["seconds"]["most"] == pytest.approx(0.45)
    assert report["kinds"]["sample rate"] == {"8000 Hz": 24}
    assert report["labels"] == {"high": 12, "low": 12}


def test_metrics_are_those_of_sklearn(run: Any) -> None:
    rows = predictions(run)
    found = [row["label"] for row in rows]
    true = [row["reference"] for row in rows]
    adapter = json.loads((run.path / "result.json").read_text())["adapter"]
    assert adapter["accuracy"] == accuracy_score(true, found)
    assert adapter["macro_f1"] == pytest.approx(f1_score(true, found, average="macro"))


def test_folders_files_and_rows_are_predicted_as_in_eval(
    run: Any, run_cli: Any, tmp_path: Path
) -> None:
    expected = {row["id"]: row["probabilities"] for row in predictions(run)}
    folder = run.folder / "data"
    rows = tmp_path / "rows.jsonl"
    names = [name for name in expected if name.endswith("/3.wav")]
    rows.write_text("".join(json.dumps({"file": str(folder / name)}) + "\n" for name in names))
    for given, ids in (
        (folder / "validation", list(expected)),
        (folder / names[0], names),
        (rows, names),
    ):
        finished = run_cli("predict", run.path, f"input={given}", "--quiet", cwd=tmp_path)
        assert finished.code == 0, finished.err
        lines = [json.loads(line) for line in finished.out.splitlines()]
        assert len(lines) == len(ids)
        for line, name in zip(lines, ids, strict=True):
            near = pytest.approx(expected[name], abs=1e-5)
            assert line["probabilities"] == near


def test_merged_model_and_peft_say_the_same(run: Any, merged: Any) -> None:
    base = transformers.AutoModelForAudioClassification.from_pretrained(run.base, num_labels=2)
    cut_model(base, 1)
    theirs = peft.PeftModel.from_pretrained(base, run.path / "adapter").eval()
    settings = json.loads((run.path / "adapter" / "adapter_config.json").read_text())
    assert settings["task_type"] is None
    labels = [merged.config.id2label[index] for index in (0, 1)]
    for row in predictions(run)[:3]:
        found = [logits_of(model, run, row["id"]) for model in (merged, theirs)]
        assert torch.allclose(found[0], found[1], atol=1e-5)
        probabilities = dict(zip(labels, found[0].softmax(-1).tolist(), strict=True))
        assert probabilities == pytest.approx(row["probabilities"], abs=1e-4)


@pytest.mark.slow
def test_onnx_says_the_same(run: Any, merged: Any, run_cli: Any, tmp_path: Path) -> None:
    output = tmp_path / "model.onnx"
    finished = run_cli("export", run.path, "format=onnx", f"output={output}", cwd=tmp_path)
    assert finished.code == 0, finished.err
    onnx: Callable[..., Any] = OnnxModel(output)
    for row in predictions(run)[:3]:
        found = [logits_of(model, run, row["id"]) for model in (merged, onnx)]
        assert torch.allclose(found[0], found[1], atol=1e-4)


def test_a_window_of_a_second_is_told_and_saved(run: Any) -> None:
    assert "at most 1 s of each sound are read" in run.said
    if run.name == "whisper":
        model = build("whisper")
        assert model.config.max_source_positions == 1500
        adapter = json.loads((run.path / "result.json").read_text())["adapter_bytes"]
        assert adapter < 4 * 1500 * WHISPER["d_model"]


def test_labels_that_train_has_not_are_refused(run: Any, run_cli: Any, tmp_path: Path) -> None:
    folder = tmp_path / "loud"
    folder.mkdir()
    (folder / "1.wav").write_bytes(wav(tone(440, 0.2)))
    finished = run_cli("eval", run.path, f"task.data.path={tmp_path}", cwd=tmp_path)
    assert finished.code == 2
    assert '"loud"' in finished.err


def test_broken_sounds_stop_a_run_before_anything_is_written(
    run: Any, run_cli: Any, tmp_path: Path
) -> None:
    data = write_folder(tmp_path / "data", train=4, evaluated=2)
    whole = wav(tone(440, 0.4))
    (data / "train" / "low" / "0.wav").write_bytes(whole[:1000])
    (data / "train" / "high" / "1.wav").write_bytes(b"not a sound")
    (data / "validation" / "low" / "0.wav").write_bytes(wav([]))
    finished = run_cli(
        *("train", "task=audio_classification", f"task.data.path={data}"),
        *(f"model.path={run.base}", f"run.dir={tmp_path / 'run'}"),
        cwd=tmp_path,
    )
    assert finished.code == 2
    assert "error[data.bad-audio]" in finished.err
    assert "3 cannot be" in finished.err
    for reason in ("cut off", "not recognised", "without samples"):
        assert reason in finished.err
    assert not (tmp_path / "run").exists()

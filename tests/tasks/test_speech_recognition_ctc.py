"""Speech recognition through every command, beside transformers, peft and jiwer."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jiwer
import peft
import pytest
import soundfile
import soxr
import torch
import transformers
from safetensors.torch import load_file
from tiny_sounds import MODELS, SIZES, melody, tone, wav, write_model, write_rows, write_speech
from torch.nn import functional

from lora_cli.config.audio import SpeechRecognitionCTCConfig
from lora_cli.config.tasks import DataConfig
from lora_cli.data.types import Row
from lora_cli.errors import UserError
from lora_cli.models.sources import resolve_model
from lora_cli.tasks.heads import load_with_head
from lora_cli.tasks.speech_recognition_ctc import SpeechRecognitionCTC, ctc_loss

# peft 0.21 asks for what transformers 5 has renamed; WavLM gives torch masks of two kinds.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask"),
]
TEXTS = ("ab ba", "cab", "ba ba ab")


def bind(name: str, folder: Path) -> tuple[Any, Any, list[Any]]:
    rows = []
    for number, text in enumerate(TEXTS):
        (folder / f"{number}.wav").write_bytes(wav(melody(text)))
        rows.append(Row(str(number), {"audio": f"{number}.wav", "text": text}, f"{folder}/r", 1))
    family, config = SpeechRecognitionCTC(), SpeechRecognitionCTCConfig()
    state = {
        "columns": {"audio": "audio", "text": "text"},
        "vocabulary": ["<pad>", "<unk>", "|", "a", "b", "c"],
    }
    process = transformers.Wav2Vec2FeatureExtractor(return_attention_mask=name != "wav2vec2")
    architecture, sizes = MODELS[name]
    torch.manual_seed(0)
    model = transformers.AutoModelForCTC.from_config(
        transformers.AutoConfig.for_model(
            architecture, **{**sizes, **family.model_options(state), "ctc_loss_reduction": "sum"}
        )
    ).eval()
    task = family.build(config, state, family.fit_processor(process, state))
    return task, model, [task.encode(row) for row in rows]


@pytest.mark.parametrize("name", ["wav2vec2", "hubert", "wavlm"])
def test_the_loss_is_that_of_transformers(name: str, tmp_path: Path) -> None:
    task, model, features = bind(name, tmp_path)
    with torch.no_grad():
        found = task.forward(model, task.collate(features))
    expected = 0.0
    for row, text in zip(features, TEXTS, strict=True):
        samples, rate = soundfile.read(row["place"]["file"], dtype="float32")
        inputs = transformers.Wav2Vec2FeatureExtractor(return_attention_mask=True)(
            soxr.resample(samples, rate, 16000), sampling_rate=16000, return_tensors="pt"
        )
        labels = torch.tensor([[" abc".index(x) + 2 for x in text]])
        with torch.no_grad():
            expected += float(model(**inputs, labels=labels).loss)
    assert float(found.loss_sum) == pytest.approx(expected, rel=1e-5)
    assert found.count == sum(map(len, TEXTS))


def test_rows_that_cannot_be_said_count_as_none() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 4, 5, requires_grad=True)
    labels = [[3, 4], [3, 3, 4]]
    frames = torch.tensor([4, 3])
    loss, count = ctc_loss(logits, frames, labels)
    expected = functional.ctc_loss(
        logits[:1].log_softmax(-1).transpose(0, 1),
        torch.tensor([[3, 4]]),
        torch.tensor([4]),
        torch.tensor([2]),
        reduction="sum",
    )
    assert count == 2
    assert torch.allclose(loss, expected)
    nothing, none = ctc_loss(logits[1:], frames[1:], labels[1:])
    assert none == 0
    nothing.backward()
    assert float(nothing.detach()) == 0


@pytest.fixture(scope="module")
def run(run_cli: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("speech")
    base = write_model(folder / "base", "hubert")
    data = write_speech(folder / "data", train=16, evaluated=4)
    finished = run_cli(
        *("train", "task=speech_recognition_ctc", f"task.data.path={data}", f"model.path={base}"),
        *("trainer.epochs=6", "trainer.global_batch_size=8", "optimizer.lr=0.02"),
        *("lora=all-linear", f"run.dir={folder / 'run'}"),
        cwd=folder,
    )
    assert finished.code == 0, finished.err
    return SimpleNamespace(folder=folder, base=base, data=data, path=folder / "run")


def predictions(run: Any) -> list[dict[str, Any]]:
    text = (run.path / "predictions" / "validation.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_metrics_are_those_of_jiwer_on_what_is_written(run: Any) -> None:
    result = json.loads((run.path / "result.json").read_text())
    rows = predictions(run)
    found, true = [row["text"] for row in rows], [row["reference"] for row in rows]
    assert result["adapter"]["wer"] == pytest.approx(jiwer.wer(true, found))
    assert result["adapter"]["cer"] == pytest.approx(jiwer.cer(true, found))
    assert result["adapter"]["loss"] < result["base"]["loss"] / 2
    for row in rows:
        assert row["text"] == " ".join(word["word"] for word in row["words"])
        times = [time for word in row["words"] for time in (word["start"], word["end"])]
        assert times == sorted(times)


def test_files_are_predicted_as_in_eval(run: Any, run_cli: Any, tmp_path: Path) -> None:
    sounds = tmp_path / "sounds"
    sounds.mkdir()
    for number in range(4):
        name = f"validation-{number}.wav"
        (sounds / name).write_bytes((run.data / "sounds" / name).read_bytes())
    finished = run_cli("predict", run.path, f"input={sounds}", "--quiet", cwd=tmp_path)
    assert finished.code == 0, finished.err
    lines = [json.loads(line) for line in finished.out.splitlines()]
    for line, row in zip(lines, predictions(run), strict=True):
        assert line["words"] == row["words"]


def test_merged_model_and_peft_say_the_same(run: Any, run_cli: Any) -> None:
    output = run.folder / "merged"
    finished = run_cli("merge", run.path, f"output={output}", cwd=run.folder)
    assert finished.code == 0, finished.err
    merged = transformers.AutoModelForCTC.from_pretrained(output).eval()
    process = transformers.AutoProcessor.from_pretrained(output)
    assert merged.config.vocab_size == len(process.tokenizer) == 6 < SIZES["vocab_size"]
    base = transformers.AutoModelForCTC.from_pretrained(run.base, vocab_size=6, pad_token_id=0)
    theirs = peft.PeftModel.from_pretrained(base, run.path / "adapter").eval()
    for number, row in enumerate(predictions(run)):
        samples, rate = soundfile.read(run.data / "sounds" / f"validation-{number}.wav")
        inputs = process(
            soxr.resample(samples, rate, 16000), sampling_rate=16000, return_tensors="pt"
        )
        with torch.no_grad():
            found = [model(**inputs).logits for model in (merged, theirs)]
        assert torch.allclose(found[0], found[1], atol=1e-4)
        text = process.batch_decode(found[0].argmax(-1))[0]
        assert " ".join(text.split()) == row["text"]


def test_a_head_of_other_letters_is_made_anew(tmp_path: Path) -> None:
    """It has as many outputs as there are letters, so that loading alone would keep it."""
    letters, family = ["<pad>", "<unk>", "|", "x", "y", "z"], SpeechRecognitionCTC()
    architecture, sizes = MODELS["hubert"]
    config = transformers.AutoConfig.for_model(architecture, **{**sizes, "vocab_size": 6})
    transformers.AutoModelForCTC.from_config(config).save_pretrained(tmp_path)
    transformers.Wav2Vec2FeatureExtractor().save_pretrained(tmp_path)
    (tmp_path / "vocab.json").write_text(json.dumps({x: n for n, x in enumerate(letters)}))
    source = resolve_model(str(tmp_path), processor=family.processor)
    stored = load_file(tmp_path / "model.safetensors")["lm_head.weight"]
    kept, *others = (
        load_with_head(source, family, {"vocabulary": found}, dtype="auto", seed=seed)
        for found, seed in (
            (letters, 0),
            (sorted(letters), 0),
            (sorted(letters), 0),
            (letters[:5], 0),
        )
    )
    assert torch.equal(kept.model.lm_head.weight, stored)
    assert kept.new_keys == ()
    assert kept.notes == ("head: that of the base is kept, whose letters are those of train",)
    new, again, smaller = others
    assert new.new_keys == smaller.new_keys == ("lm_head.bias", "lm_head.weight")
    assert "says other letters" in new.notes[0]
    assert not torch.allclose(new.model.lm_head.weight, stored, atol=1e-3)
    assert torch.equal(new.model.lm_head.weight, again.model.lm_head.weight)
    assert float(new.model.lm_head.weight.detach().std()) == pytest.approx(
        sizes["initializer_range"], rel=0.2
    )
    body = [model.model.hubert.state_dict() for model in (kept, new)]
    assert all(torch.equal(value, body[1][name]) for name, value in body[0].items())


@pytest.mark.slow
def test_an_onnx_file_says_the_same(run: Any, run_cli: Any) -> None:
    output = run.folder / "model.onnx"
    finished = run_cli("export", run.path, "format=onnx", f"output={output}", cwd=run.folder)
    assert finished.code == 0, finished.err
    finished = run_cli("eval", run.path, f"exported={output}", "--json", cwd=run.folder)
    result = json.loads(finished.out)
    assert result["exported"] == pytest.approx(result["adapter"], rel=1e-4)


@pytest.mark.parametrize(
    ("text", "said"),
    [("", "must hold a text in every row"), ("?!", "nothing is left of 1 transcripts")],
)
def test_empty_transcripts_are_refused(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(wav(tone(300, 0.3)))
    rows = [{"audio": "a.wav", "text": "ab"}] * 12
    write_rows(tmp_path, [*rows, {"audio": "a.wav", "text": text}])
    config = SpeechRecognitionCTCConfig(data=DataConfig(path=str(tmp_path)))
    with pytest.raises(UserError, match=said):
        SpeechRecognitionCTC().load(config, seed=0)


def test_long_rows_are_not_trained_on() -> None:
    family, config = SpeechRecognitionCTC(), SpeechRecognitionCTCConfig(max_seconds=11)
    rows = [{"measures": {"seconds": seconds}} for seconds in (5, 11, 12)]
    kept, notes = family.arrange(config, rows, torch.nn.Identity())
    assert kept == rows[:2]
    assert notes == ("left out 1 of 3 rows, longer than task.max_seconds=11",)
    with pytest.raises(UserError, match=r"longer than task\.max_seconds=11"):
        family.arrange(config, rows[2:], torch.nn.Identity())

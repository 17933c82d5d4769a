"""Whisper through every command, beside transformers, peft and jiwer."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jiwer
import numpy as np
import peft
import pytest
import soundfile
import soxr
import torch
import transformers
from tiny_sounds import LONG, melody, wav, write_rows, write_speech
from tiny_sounds import write_whisper as write_base

from lora_cli.config.audio import SpeechRecognitionSeq2SeqConfig
from lora_cli.config.generation import GenerationConfig
from lora_cli.data.transcripts import normalize
from lora_cli.data.types import Row
from lora_cli.errors import UserError
from lora_cli.models.base import load_base
from lora_cli.models.processors import agree_with, load_processor
from lora_cli.models.sources import resolve_model
from lora_cli.tasks.speech_recognition_seq2seq import SpeechRecognitionSeq2Seq

# peft 0.21 asks for what transformers 5 has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
TEXTS = ("ab ba", "Cab!", "ba ba ab", LONG)
FAMILY = SpeechRecognitionSeq2Seq()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("whisper"))


def bind(base: Path, folder: Path, **settings: Any) -> tuple[Any, Any, Any, list[Any]]:
    """Return task, model, processor and encoded rows, as the commands make them."""
    rows = []
    for number, text in enumerate(TEXTS):
        sound = melody(text.lower().strip("!"))
        (folder / f"{number}.wav").write_bytes(wav(sound))
        rows.append(Row(str(number), {"audio": f"{number}.wav", "text": text}, f"{folder}/r", 1))
    config = SpeechRecognitionSeq2SeqConfig(**{"language": "german", **settings})
    state = {
        "columns": {"audio": "audio", "text": "text"},
        **FAMILY.learn(config, (), None, {}),  # type: ignore[arg-type]
    }
    source = resolve_model(str(base), processor=FAMILY.processor)
    model = load_base(source, auto_class=FAMILY.auto_class, options={}, dtype="auto", seed=0).model
    FAMILY.fit_model(model, state)
    processor = FAMILY.fit_processor(load_processor(source, FAMILY.processor), state)
    agree_with(processor, model, source)
    task = FAMILY.build(config, state, processor)
    return task, model, processor, [task.encode(row) for row in rows]


def hear(process: Any, path: Path) -> Any:
    samples, rate = soundfile.read(path, dtype="float32")
    return process(soxr.resample(samples, rate, 16000), sampling_rate=16000, return_tensors="pt")


@pytest.mark.parametrize("translate", [False, True])
def test_the_loss_is_that_of_transformers(translate: bool, base: Path, tmp_path: Path) -> None:
    task, model, process, features = bind(base, tmp_path, translate=translate)
    with torch.no_grad():
        found = task.forward(model, {**task.collate(features[:3]), "seed": 1})
    tokenizer = transformers.WhisperTokenizer.from_pretrained(
        base, language="de", task="translate" if translate else "transcribe"
    )
    expected, count = 0.0, 0
    for number, text in enumerate(TEXTS[:3]):
        # The recipe of transformers: the first token is added by the model, as it shifts.
        whole = torch.tensor(tokenizer(f" {text}")["input_ids"])[None]
        labels = whole[:, 1:].clone()
        labels[:, :3] = -100
        inputs = hear(process.feature_extractor, tmp_path / f"{number}.wav")
        with torch.no_grad():
            loss = model(**inputs, decoder_input_ids=whole[:, :-1], labels=labels).loss
        expected += float(loss) * (labels.shape[1] - 3)
        count += labels.shape[1] - 3
    assert whole[0, :4].tolist() == tokenizer.convert_tokens_to_ids(
        ["<|startoftranscript|>", "<|de|>", f"<|{tokenizer.task}|>", "<|notimestamps|>"]
    )
    assert float(found.loss_sum) == pytest.approx(expected, rel=1e-5)
    assert found.count == count


def test_long_sounds_and_transcripts_are_not_trained_on(base: Path, tmp_path: Path) -> None:
    _, model, _, features = bind(base, tmp_path)
    config = SpeechRecognitionSeq2SeqConfig()
    assert [row["fits"] for row in features] == [True, True, True, False]
    kept, notes = FAMILY.arrange(config, features, model)
    assert kept == features[:3]
    assert notes == ("left out 1 of 4 rows, longer than the window of 2 s",)
    with pytest.raises(UserError, match="longer than the window of 2 s"):
        FAMILY.arrange(config, features[3:], model)
    _, _, _, features = bind(base, tmp_path, max_target_length=8)
    assert [row["target"] is None for row in features] == [False, True, False, True]
    assert [row["supervised"] for row in features] == [3, 0, 4, 0]
    _, notes = FAMILY.arrange(SpeechRecognitionSeq2SeqConfig(max_target_length=8), features, model)
    assert notes[1] == "left out 1 of 3 rows, longer than task.max_target_length=8"


def test_the_window_is_cut(base: Path, tmp_path: Path) -> None:
    task, model, process, features = bind(base, tmp_path, max_seconds=1)
    assert model.config.max_source_positions == 50
    assert process.feature_extractor.n_samples == 16000
    assert not features[3]["fits"]
    with torch.no_grad():
        found = task.forward(model, task.collate(features))
    assert {row.id for row in task.decode(found.outputs, task.collate(features))} == set("0123")
    plain: Any = transformers.AutoModelForSpeechSeq2Seq.from_pretrained(base).eval()
    plain.config.max_source_positions = 50
    encoder = plain.model.encoder
    encoder.embed_positions = torch.nn.Embedding.from_pretrained(
        encoder.embed_positions.weight[:50]
    )
    inputs = hear(process.feature_extractor, tmp_path / "0.wav")
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        said = [each(**inputs, decoder_input_ids=ids).logits for each in (model, plain)]
    assert torch.equal(*said)


def test_the_masks_of_training_follow_from_the_step(base: Path, tmp_path: Path) -> None:
    task, model, _, features = bind(base, tmp_path)
    model.config.apply_spec_augment, model.config.mask_time_prob = True, 0.5
    model.train()
    found = []
    for seed in (1, 1, 2):
        np.random.random()
        with torch.no_grad():
            found.append(task.forward(model, {**task.collate(features[:3]), "seed": seed}).loss_sum)
    assert found[0] == found[1] != found[2]


def test_a_few_sounds_are_learned_and_written(base: Path, tmp_path: Path) -> None:
    generation = GenerationConfig(max_new_tokens=12)
    task, model, _, features = bind(base, tmp_path, generation=generation)
    batch = task.collate(features[:3])
    steps = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(60):
        found = task.forward(model, {**batch, "seed": 0})
        (found.loss_sum / found.count).backward()
        steps.step()
        steps.zero_grad()
    with torch.no_grad():
        rows = task.decode(task.forward(model, batch).outputs, batch)
    assert [(row.text, row.is_ended) for row in rows] == [(text, True) for text in TEXTS[:3]]
    assert task.metrics(rows)["wer"] == 0
    assert task.metrics(rows)["token_accuracy"] == 1


@pytest.fixture(scope="module")
def run(base: Path, run_cli: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("speech")
    data = write_speech(folder / "data", train=12, evaluated=4)
    (data / "sounds" / "long.wav").write_bytes(wav(melody(LONG)))
    for split in ("train", "validation"):
        rows = [json.loads(line) for line in (data / f"{split}.jsonl").read_text().splitlines()]
        write_rows(data, [*rows, {"audio": "sounds/long.wav", "text": f"{LONG.title()}."}], split)
    finished = run_cli(
        *("train", "task=speech_recognition_seq2seq", "task.language=en"),
        *(f"task.data.path={data}", f"model.path={base}", "task.generation.max_new_tokens=20"),
        *("task.max_target_length=40", "trainer.epochs=6", "trainer.global_batch_size=4"),
        *("optimizer.lr=0.02", "lora=all-linear", f"run.dir={folder / 'run'}"),
        cwd=folder,
    )
    assert finished.code == 0, finished.err
    return SimpleNamespace(
        folder=folder, base=base, data=data, path=folder / "run", said=finished.err
    )


def predictions(run: Any) -> list[dict[str, Any]]:
    text = (run.path / "predictions" / "validation.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_texts_are_scored_as_jiwer_does(run: Any) -> None:
    result, rows = json.loads((run.path / "result.json").read_text()), predictions(run)
    assert "train: left out 1 of 13 rows, longer than the window of 2 s" in run.said
    assert result["adapter"]["loss"] < 0.9 * result["base"]["loss"]
    true, found = (
        [normalize(row[name], "basic") for row in rows] for name in ("reference", "text")
    )
    assert result["adapter"]["wer"] == pytest.approx(jiwer.wer(true, found))
    assert result["adapter"]["cer"] == pytest.approx(jiwer.cer(true, found))
    assert [row["scored"]["text"] for row in rows] == found
    assert "loss" not in rows[-1]
    assert rows[-1]["reference"].startswith("Cab Ba")


def test_files_are_predicted_as_in_eval(run: Any, run_cli: Any, tmp_path: Path) -> None:
    rows = [{"audio": str(run.data / "sounds" / "long.wav")}]
    rows += [{"audio": str(run.data / "sounds" / f"validation-{n}.wav")} for n in range(4)]
    write_rows(tmp_path, rows, "rows")
    finished = run_cli(
        "predict", run.path, f"input={tmp_path / 'rows.jsonl'}", "--quiet", cwd=tmp_path
    )
    assert finished.code == 0, finished.err
    texts = [json.loads(line)["text"] for line in finished.out.splitlines()]
    assert [*texts[1:], texts[0]] == [row["text"] for row in predictions(run)]


def test_merged_model_and_peft_say_the_same(run: Any, run_cli: Any) -> None:
    output = run.folder / "merged"
    finished = run_cli("merge", run.path, f"output={output}", cwd=run.folder)
    assert finished.code == 0, finished.err
    merged = transformers.AutoModelForSpeechSeq2Seq.from_pretrained(output).eval()
    process = transformers.AutoProcessor.from_pretrained(output)
    theirs = peft.PeftModel.from_pretrained(
        transformers.AutoModelForSpeechSeq2Seq.from_pretrained(run.base), run.path / "adapter"
    ).eval()
    assert (
        json.loads((run.path / "adapter" / "adapter_config.json").read_text())["task_type"] is None
    )
    for number, row in enumerate(predictions(run)[:-1]):
        inputs = hear(process, run.data / "sounds" / f"validation-{number}.wav")
        # Neither language nor task is given: the merged model has them in its settings.
        written = merged.generate(**inputs, max_new_tokens=20)
        assert process.batch_decode(written, skip_special_tokens=True)[0].strip() == row["text"]
        read = torch.tensor(process.tokenizer(f" {row['text']}")["input_ids"])[None]
        with torch.no_grad():
            found = [model(**inputs, decoder_input_ids=read).logits for model in (merged, theirs)]
        assert torch.allclose(found[0], found[1], atol=1e-4)


def test_onnx_is_refused(run: Any, run_cli: Any) -> None:
    finished = run_cli("export", run.path, "format=onnx", cwd=run.folder)
    assert finished.code == 2
    assert "writes token by token" in finished.err


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"language": "germn"}, 'but is "germn"'),
        ({"language": None}, "a language of the model's tokenizer, but is null"),
        ({"language": None, "translate": True}, "must say what language is spoken"),
        ({"generate_in_eval": False}, "must be loss where no texts are written"),
    ],
)
def test_what_is_spoken_must_be_known(
    settings: dict[str, Any], said: str, base: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=said):
        bind(base, tmp_path, **settings)


def test_models_of_english_alone_have_no_language(tmp_path: Path) -> None:
    english = write_base(tmp_path / "base", is_multilingual=False)
    with pytest.raises(UserError, match="knows English alone"):
        bind(english, tmp_path)
    config = GenerationConfig(max_new_tokens=20)
    task, model, process, features = bind(english, tmp_path, language=None, generation=config)
    batch = task.collate(features[:1])
    with torch.no_grad():
        found = task.decode(task.forward(model, batch).outputs, batch)
        written = model.generate(
            **hear(process.feature_extractor, tmp_path / "0.wav"), max_new_tokens=20
        )
    assert found[0].text == process.batch_decode(written, skip_special_tokens=True)[0].strip()


def test_other_architectures_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="but wav2vec2 is another"):
        FAMILY.fit_model(
            SimpleNamespace(config=SimpleNamespace(model_type="wav2vec2")),  # type: ignore[arg-type]
            {},
        )

"""What models are given of a sound: the same in every batch, a random part in training only."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from tiny_sounds import MODELS, build, extractor, tone, wav, write_rows

from lora_cli.config.audio import AudioClassificationConfig
from lora_cli.config.tasks import DataConfig
from lora_cli.data.types import Row
from lora_cli.errors import UserError
from lora_cli.lora.inject import freeze_base, inject_lora
from lora_cli.lora.settings import LoraSettings
from lora_cli.lora.targets import resolve_targets
from lora_cli.models.families import auto_targets
from lora_cli.tasks.audio import AudioReader
from lora_cli.tasks.audio_classification import AudioClassification

pytestmark = pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")

SECONDS = (0.3, 0.9, 0.02, 0.45, 1.5)


@pytest.fixture
def rows(tmp_path: Path) -> list[Row]:
    found = []
    for number, seconds in enumerate(SECONDS):
        (tmp_path / f"{number}.wav").write_bytes(wav(tone(300 + 90 * number, seconds)))
        values = {"audio": f"{number}.wav", "label": ("low", "high")[number % 2]}
        found.append(Row(str(number), values, f"{tmp_path}/rows.jsonl", number + 1))
    return found


def bind(name: str, seconds: int = 1, **augmentation: float) -> tuple[Any, Any]:
    config = AudioClassificationConfig()
    augmented = type(config.augmentation)(**augmentation)
    state = {
        "columns": {"audio": "audio", "label": "label"},
        "labels": ["low", "high"],
        "numbered": False,
        "seconds": seconds,
    }
    family, model = AudioClassification(), build(name)
    family.fit_model(model, state)
    process = family.fit_processor(extractor(name), state)
    config = AudioClassificationConfig(augmentation=augmented)
    return family.build(config, state, process), model


@pytest.mark.parametrize("name", MODELS)
def test_a_row_says_the_same_in_every_batch(name: str, rows: list[Row]) -> None:
    task, model = bind(name)
    features = [task.encode(row) for row in rows]
    with torch.no_grad():
        together = task.forward(model, task.collate(features))
        alone = [task.forward(model, task.collate([row])) for row in features]
    found = torch.cat([one.outputs["logits"] for one in alone])
    assert torch.allclose(together.outputs["logits"], found, atol=1e-5)
    assert float(together.loss_sum) == pytest.approx(
        sum(float(x.loss_sum) for x in alone), abs=1e-4
    )
    assert together.count == len(rows)


@pytest.mark.parametrize("name", MODELS)
def test_every_usual_adapter_is_trained(name: str, rows: list[Row]) -> None:
    task, model = bind(name)
    names = resolve_targets(
        model,
        targets="auto",
        exclude=(),
        auto=auto_targets(model.config.model_type),
        saved_modules=(),
    ).names
    inject_lora(model, names, LoraSettings(r=2, alpha=2.0))
    freeze_base(model, (), bias="none")
    task.forward(model, task.collate([task.encode(row) for row in rows[:2]])).loss_sum.backward()
    trained = {key: value for key, value in model.named_parameters() if "lora_B" in key}
    assert len(trained) == len(names) > 0
    assert all(value.grad is not None and value.grad.any() for value in trained.values())


@pytest.mark.parametrize("name", ["wav2vec2", "hubert"])
def test_the_extractor_gets_the_sound_at_its_rate(name: str, rows: list[Row]) -> None:
    task, model = bind(name)
    batch = task.collate([task.encode(rows[1])])
    ((places, inputs),) = task._sounds.parts(batch, model)
    import soxr

    samples, rate = soundfile.read(str(Path(rows[1].source).parent / "1.wav"), dtype="float32")
    expected = extractor(name)(soxr.resample(samples, rate, 16000), sampling_rate=16000)
    assert places == [0]
    assert np.allclose(inputs["input_values"][0], expected["input_values"][0], atol=1e-5)


def test_long_sounds_are_cut_to_their_middle_and_at_random_in_training(rows: list[Row]) -> None:
    task, _ = bind("wav2vec2")
    encoded = task.encode(rows[4])
    assert encoded["kinds"]["length"] == "cut to 1 s"
    assert encoded["length"] == 16000
    assert encoded["measures"] == {"seconds": 1.5}
    reader: AudioReader = task._sounds
    place = [encoded["place"]]
    middle = reader.process(place, ["4"], seed=None)["input_values"]
    drawn = [reader.process(place, ["4"], seed=seed)["input_values"] for seed in (1, 1, 2)]
    assert middle.shape == drawn[0].shape == (1, 16000)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0], middle)


def test_changes_are_for_training_only(rows: list[Row]) -> None:
    plain, _ = bind("whisper")
    task, _ = bind("whisper", gain=10, noise=1, noise_snr=0)
    place = [task.encode(rows[0])["place"]]
    found = [
        one._sounds.process(place, ["0"], seed=seed)["input_features"]
        for one, seed in ((plain, None), (task, None), (task, 3))
    ]
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def load(folder: Path, **settings: Any) -> Any:
    config = AudioClassificationConfig(data=DataConfig(path=str(folder)), **settings)
    return AudioClassification().load(config, seed=0)


def test_seconds_are_those_of_the_longest_of_train(rows: list[Row], tmp_path: Path) -> None:
    write_rows(tmp_path, [dict(row.values) for row in rows] * 4)
    splits = load(tmp_path)
    assert splits.state["seconds"] == 2
    assert "at most 2 s of each sound are read" in splits.notes[-1]
    assert load(tmp_path, max_seconds=7).state["seconds"] == 7


def test_missing_files_are_told_of_together(rows: list[Row], tmp_path: Path) -> None:
    lost = [{"audio": f"no/{number}.wav", "label": "low"} for number in range(12)]
    write_rows(tmp_path, [*(dict(row.values) for row in rows), *lost])
    with pytest.raises(UserError, match="12 cannot be") as caught:
        load(tmp_path)
    (problem,) = caught.value.problems
    assert "no/9.wav" in str(problem.where)
    assert "no/10.wav" not in str(problem.where)


def test_a_column_that_is_not_there_is_named(rows: list[Row], tmp_path: Path) -> None:
    write_rows(tmp_path, [{"clip": row.values["audio"], "label": "low"} for row in rows])
    with pytest.raises(UserError, match=r"task\.data\.audio_column"):
        load(tmp_path)

"""Processors of every kind, loaded from folders alone."""

import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import transformers
from safetensors.torch import load_file, save_file
from tiny_sounds import write_whisper
from tiny_vision import PIXELS, write_tiny_pairs, write_tiny_vision

from lora_cli.errors import UserError
from lora_cli.models.base import load_base
from lora_cli.models.processors import (
    agree_with,
    is_sigmoid,
    load_processor,
    processor_facts,
    sample_inputs,
    tokenizer_of,
)
from lora_cli.models.sources import resolve_model


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vit")
    write_tiny_vision(folder, "vit")
    return folder


def test_a_tokenizer_is_its_own(tiny_model_dir: Callable[..., Path]) -> None:
    tokenizer = load_processor(resolve_model(str(tiny_model_dir())), "tokenizer")
    assert tokenizer_of(tokenizer) is tokenizer
    assert processor_facts(tokenizer)["sides"] == ["right", "right"]
    assert sample_inputs(tokenizer)["input_ids"].shape[-1] > 3


def test_an_image_processor_has_none(vit: Path) -> None:
    source = resolve_model(str(vit), processor="image processor")
    processor = load_processor(source, "image processor")
    assert tokenizer_of(processor) is None
    assert processor_facts(processor) == {}
    assert sample_inputs(processor)["pixel_values"].shape == (2, 3, PIXELS, PIXELS)
    other: Any = SimpleNamespace()
    agree_with(processor, other, source)
    assert "preprocessor_config.json" in source.settings


def test_the_tokenizer_of_a_combined_processor() -> None:
    assert tokenizer_of(SimpleNamespace(tokenizer="it")) == "it"


def test_a_feature_extractor_makes_a_second_of_silence() -> None:
    extractor = transformers.Wav2Vec2FeatureExtractor()
    assert sample_inputs(extractor)["input_values"].shape == (2, 16_000)


def test_a_speech_processor_has_two_parts(tmp_path: Path) -> None:
    source = resolve_model(str(write_whisper(tmp_path)), processor="speech processor")
    processor = load_processor(source, "speech processor")
    assert tokenizer_of(processor) is processor.tokenizer
    assert sample_inputs(processor)["input_features"].shape == (2, 16, 200)
    model = load_base(
        source, auto_class="AutoModelForSpeechSeq2Seq", options={}, dtype="auto", seed=0
    ).model
    processor.tokenizer.add_tokens(["one more"])
    with pytest.raises(UserError, match="whose tokenizer belongs to the model"):
        agree_with(processor, model, source)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="with a tokenizer") as caught:
        resolve_model(str(tmp_path), processor="speech processor")
    assert [problem.id for problem in caught.value.problems] == ["model.no-tokenizer"]


def test_a_folder_without_one_is_refused(vit: Path, tmp_path: Path) -> None:
    shutil.copytree(vit, tmp_path / "m")
    (tmp_path / "m" / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match="with an image processor") as caught:
        resolve_model(str(tmp_path / "m"), processor="image processor")
    assert caught.value.problems[0].id == "model.no-image-processor"


def test_one_that_cannot_be_read_is_refused(vit: Path, tmp_path: Path) -> None:
    shutil.copytree(vit, tmp_path / "m")
    (tmp_path / "m" / "preprocessor_config.json").write_text('{"image_processor_type": "Nothing"}')
    (tmp_path / "m" / "config.json").write_text('{"model_type": "bert"}')
    source = resolve_model(str(tmp_path / "m"), processor="image processor")
    with pytest.raises(UserError, match="that transformers can load") as caught:
        load_processor(source, "image processor")
    assert caught.value.problems[0].id == "model.bad-processor"


def test_the_extra_is_named(vit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = resolve_model(str(vit), processor="image processor")
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "PIL" else find(name)
    )
    with pytest.raises(UserError) as caught:
        load_processor(source, "image processor")
    assert caught.value.problems[0].fix == 'pip install "lora-cli[vision]"'


def test_a_lost_layer_of_the_image_half_of_clip_is_told(tmp_path: Path) -> None:
    """Its classifier names the body otherwise than other models do."""
    write_tiny_vision(tmp_path, "clip")
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    lost = "vision_model.encoder.layers.1.mlp.fc1.weight"
    save_file({name: x for name, x in weights.items() if name != lost}, file, {"format": "pt"})
    source = resolve_model(str(tmp_path), processor="image processor")
    options = {"num_labels": 2}
    with pytest.raises(UserError, match=f"missing or of another shape, such as {lost}"):
        load_base(
            source,
            auto_class="AutoModelForImageClassification",
            options=options,
            dtype="auto",
            seed=0,
        )


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    def write(kind: str) -> Path:
        folder = tmp_path_factory.mktemp(kind)
        write_tiny_pairs(folder, kind, captions=["a red square", "a blue square"])
        return folder

    return write


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_one_for_images_and_texts(pairs: Callable[[str], Path], kind: str) -> None:
    source = resolve_model(str(pairs(kind)), processor="image and text processor")
    processor = load_processor(source, "image and text processor")
    model = transformers.AutoModel.from_pretrained(source.folder)
    processor.tokenizer.padding_side = "left"
    agree_with(processor, model, source)
    assert is_sigmoid(processor) == (kind == "siglip")
    inputs = sample_inputs(processor)
    assert inputs["pixel_values"].shape == (2, 3, PIXELS, PIXELS)
    assert inputs["input_ids"].shape[0] == 2
    # SigLIP reads the last place of a text, wherever that was in training.
    side = "left" if kind == "siglip" else "right"
    assert processor_facts(processor)["sides"] == [side, "right"]


def test_more_tokens_than_the_half_for_texts_embeds(pairs: Callable[[str], Path]) -> None:
    source = resolve_model(str(pairs("clip")), processor="image and text processor")
    processor = load_processor(source, "image and text processor")
    processor.tokenizer.add_tokens(["one more"])
    model = transformers.AutoModel.from_pretrained(source.folder)
    with pytest.raises(UserError, match="tokens for"):
        agree_with(processor, model, source)


def test_the_processor_of_the_other_loss_is_refused(pairs: Callable[[str], Path]) -> None:
    source = resolve_model(str(pairs("clip")), processor="image and text processor")
    processor = load_processor(source, "image and text processor")
    other = transformers.SiglipProcessor(processor.image_processor, processor.tokenizer)
    model = transformers.AutoModel.from_pretrained(source.folder)
    with pytest.raises(UserError, match="this CLIPModel comes with a SiglipProcessor"):
        agree_with(other, model, source)

import copy
import json
import pickle
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import transformers
from PIL import Image
from tiny_image_chat import VIDEOS, make_config, make_processor

from lora_cli.models.image_chat import ImageChatProcessor, without_videos


@pytest.fixture
def qwen(tmp_path: Path) -> Path:
    processor = make_processor("qwen2_vl")
    processor.save_pretrained(tmp_path)
    make_config("qwen2_vl", processor.tokenizer).save_pretrained(tmp_path)
    return tmp_path


def inputs(processor: Any) -> dict[str, Any]:
    image = Image.new("RGB", (30, 20), (200, 10, 10))
    found = processor(text=["what <|image_pad|> ?"], images=[image], return_tensors="pt")
    return {name: value.tolist() for name, value in found.items()}


def test_a_processor_without_its_videos_is_one_of_its_class(qwen: Path) -> None:
    processor = ImageChatProcessor.from_pretrained(qwen)
    assert isinstance(processor, transformers.Qwen2VLProcessor)
    assert json.loads((qwen / "processor_config.json").read_text())["processor_class"] == (
        "Qwen2VLProcessor"
    )
    assert inputs(processor) == inputs(make_processor("qwen2_vl"))
    assert processor.chat_template == make_processor("qwen2_vl").chat_template
    for again in (pickle.loads(pickle.dumps(processor)), copy.deepcopy(processor)):
        assert inputs(again) == inputs(processor)


@pytest.mark.parametrize("place", ["nested", "own", "shared", "none"])
def test_settings_of_videos_stay_with_it(qwen: Path, tmp_path: Path, place: str) -> None:
    """They are in the file of the processor, in their own, or in that of images, as they were."""
    names = {"own": "video_preprocessor_config.json", "shared": "preprocessor_config.json"}
    if place == "nested":
        whole = json.loads((qwen / "processor_config.json").read_text())
        text = json.dumps({**whole, "video_processor": VIDEOS})
        (qwen / "processor_config.json").write_text(text)
    elif place != "none":
        (qwen / names[place]).write_text(json.dumps(VIDEOS))
    saved = tmp_path / "saved"
    processor = ImageChatProcessor.from_pretrained(qwen)
    processor.save_pretrained(saved)
    kept = saved / names["own"]
    assert kept.is_file() == (place != "none")
    if kept.is_file():
        assert json.loads(kept.read_text()) == VIDEOS
    assert "video_settings" not in (saved / "processor_config.json").read_text()
    make_config("qwen2_vl", processor.tokenizer).save_pretrained(saved)
    assert inputs(ImageChatProcessor.from_pretrained(saved)) == inputs(processor)


def test_with_torchvision_it_is_that_of_transformers(
    qwen: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = ModuleType("torchvision")
    module.__spec__ = sys.__spec__
    monkeypatch.setitem(sys.modules, "torchvision", module)
    found = object()
    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", lambda *_, **__: found)
    assert ImageChatProcessor.from_pretrained(qwen) is found


def test_processors_of_images_alone_are_those_of_transformers(tmp_path: Path) -> None:
    processor = make_processor("llava")
    processor.save_pretrained(tmp_path)
    make_config("llava", processor.tokenizer).save_pretrained(tmp_path)
    assert type(ImageChatProcessor.from_pretrained(tmp_path)) is transformers.LlavaProcessor
    assert without_videos(transformers.Qwen2VLProcessor).get_attributes() == [
        "image_processor",
        "tokenizer",
    ]

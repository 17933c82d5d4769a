from typing import Any

import pytest
import torch
import transformers
from PIL import Image

from lora_cli.errors import UserError
from lora_cli.models.tiny import default_config, make_tokenizer, write_tiny_model
from lora_cli.models.tiny_image_chat import make_image_chat_processor

KINDS = ("llava", "llava_next", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "idefics3", "gemma3")


def make(kind: str) -> tuple[Any, Any]:
    config = default_config(kind, layers=1, positions=64)
    return config, make_image_chat_processor(config, make_tokenizer(["what is it"] * 9))


@pytest.mark.parametrize("kind", KINDS)
def test_a_narrow_model_reads_what_its_processor_makes(kind: str, tmp_path: Any) -> None:
    config, processor = make(kind)
    assert config.get_text_config().num_hidden_layers == 1
    vision = config.vision_config
    for name in ("num_hidden_layers", "depth"):
        if hasattr(vision, name):
            setattr(vision, name, 1)
    if kind == "qwen3_vl":
        vision.deepstack_visual_indexes = [0]
    auto = "AutoModelForImageTextToText"
    write_tiny_model(tmp_path, config, processor, auto_class=auto, width=64, seed=0)
    model = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    assert sum(p.numel() for p in model.parameters()) < 1_000_000
    for name, parameter in model.named_parameters():
        # It starts at zero in Gemma 3, so that all images look the same.
        if "mm_input_projection" in name:
            torch.nn.init.normal_(parameter)
    parts = [{"type": "image"}, {"type": "text", "text": "what is it"}]
    text = processor.tokenizer.apply_chat_template(
        [{"role": "user", "content": parts}],
        chat_template=processor.chat_template,
        tokenize=False,
    )
    found = []
    for shade in (0, 255):
        image = Image.new("RGB", (40, 30), (shade, 0, 255 - shade))
        inputs = processor(text=[text], images=[[image]], return_tensors="pt")
        with torch.no_grad():
            found.append(model(**inputs).logits[0, -1])
    assert torch.isfinite(found[0]).all()
    assert not torch.equal(*found)


def test_others_are_refused() -> None:
    config = default_config("internvl", layers=1, positions=64)
    with pytest.raises(UserError, match="none can be made up for internvl"):
        make_image_chat_processor(config, make_tokenizer(["a"]))

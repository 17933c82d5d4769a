"""Random models of images, small enough for tests, and images that tell their label by a stripe."""

import json
import math
import random
from collections.abc import Iterable
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

PIXELS = 16
_LAYERS = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": PIXELS,
    "patch_size": 4,
    "initializer_range": 0.2,
}
_STAGES = {"depths": [1, 1], "image_size": PIXELS, "patch_size": 2, "initializer_range": 0.2}
_TEXT = {
    **{name: _LAYERS[name] for name in ("hidden_size", "num_hidden_layers", "intermediate_size")},
    "num_attention_heads": 2,
    "vocab_size": 64,
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 1),
}
SIZES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("vit", "deit", "beit", "dinov2"), _LAYERS),
    "swin": {**_STAGES, "embed_dim": 16, "num_heads": [2, 2], "window_size": 4},
    "convnext": {**_STAGES, "hidden_sizes": [16, 32], "num_stages": 2},
    "clip": {"vision_config": _LAYERS, "text_config": _TEXT, "projection_dim": 16},
    "siglip": {"vision_config": _LAYERS, "text_config": _TEXT},
    "chinese_clip": {"vision_config": _LAYERS, "text_config": _TEXT, "projection_dim": 16},
    "metaclip_2": {"vision_config": _LAYERS, "text_config": _TEXT, "projection_dim": 16},
    "siglip2": {"vision_config": {**_LAYERS, "num_patches": 16}, "text_config": _TEXT},
}


COLOURS = {
    **{"red": (220, 0, 0), "green": (0, 200, 0), "blue": (0, 0, 220), "white": (255, 255, 255)},
    **{"black": (0, 0, 0), "yellow": (230, 230, 0), "pink": (255, 120, 200)},
    "brown": (120, 70, 20),
}


def write_tiny_vision(folder: Path, kind: str, *, seed: int = 0, dtype: str = "float32") -> None:
    """Write a random model without a head and its image processor into a folder."""
    import torch
    import transformers

    config = transformers.AutoConfig.for_model(kind, **SIZES[kind])
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.AutoModel.from_config(config)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    size = {"height": PIXELS, "width": PIXELS}
    transformers.ViTImageProcessorPil(size=size).save_pretrained(folder)


def write_tiny_pairs(folder: Path, kind: str, *, captions: Iterable[str], seed: int = 0) -> None:
    """Write a random dual encoder, such as clip, and a processor that knows some captions."""
    import torch
    import transformers

    from lora_cli.models.tiny import make_processor

    vision: Any = SimpleNamespace(model_type=kind, image_size=PIXELS)
    processor = make_processor("image and text processor", vision, captions)
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    special = {name: getattr(processor.tokenizer, name) for name in names}
    text = {**_TEXT, **special, "vocab_size": len(processor.tokenizer)}
    text["max_position_embeddings"] = 16
    config = transformers.AutoConfig.for_model(kind, **{**SIZES[kind], "text_config": text})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.AutoModel.from_config(config)
    if kind == "siglip2":
        images = transformers.Siglip2ImageProcessorPil(patch_size=4, max_num_patches=16)
        processor = transformers.Siglip2Processor(images, processor.tokenizer)
    if hasattr(model, "logit_bias"):
        # Where training starts in the paper; a new model of transformers has 1 and 0.
        model.logit_scale.data.fill_(math.log(10))
        model.logit_bias.data.fill_(-10)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def write_captioned(folder: Path, *, copies: int = 1) -> Path:
    """Write images of eight colours with metadata.jsonl, `copies` of each, all for each split."""
    from PIL import Image

    draw = random.Random(0)
    for split in ("train", "validation", "test"):
        (folder / split).mkdir(parents=True)
        lines = []
        for colour, value in COLOURS.items():
            for copy in range(copies if split == "train" else 1):
                name = f"{colour}-{copy}.png"
                picture = Image.new("RGB", (20, 20), value)
                picture.putpixel((draw.randrange(20), draw.randrange(20)), (9, 9, 9))
                (folder / split / name).write_bytes(png(picture))
                row = {"file_name": name, "text": f"a {colour} square", "colour": colour}
                lines.append(json.dumps(row) + "\n")
        (folder / split / "metadata.jsonl").write_text("".join(lines))
    return folder


def striped(label: str, draw: random.Random, *, size: tuple[int, int] = (20, 18)) -> Any:
    """Return an image of dots in RGB: red at the top, or blue at the bottom, by its label."""
    from PIL import Image

    picture = Image.frombytes("RGB", size, draw.randbytes(3 * size[0] * size[1]))
    colour, top = ((255, 0, 0), 0) if label == "red" else ((0, 0, 255), size[1] // 2)
    picture.paste(colour, (0, top, size[0], top + size[1] // 2))
    return picture


def png(image: Any, format_: str = "PNG", **options: Any) -> bytes:
    """Return an image as a file."""
    content = BytesIO()
    image.save(content, format_, **options)
    return content.getvalue()


def write_image_folder(folder: Path, *, train: int = 32, test: int = 12, seed: int = 0) -> Path:
    """Write train/red/0.png, ..., half of each label, and a split for validation and for test."""
    draw = random.Random(seed)
    for split, count in (("train", train), ("validation", test), ("test", test)):
        for number in range(count):
            label = ("red", "blue")[number % 2]
            path = folder / split / label / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png(striped(label, draw)))
    return folder

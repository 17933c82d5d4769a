"""Random models of images, small enough for tests, and images that tell their label by a stripe."""

import random
from io import BytesIO
from pathlib import Path
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

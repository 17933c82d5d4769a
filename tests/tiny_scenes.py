"""Random models of parts of images, small enough for tests, and pictures of coloured shapes."""

import json
import random
from pathlib import Path
from typing import Any

PIXELS = 32
COLOURS = {"red": (220, 30, 30), "blue": (30, 30, 220)}
SIZES: dict[str, dict[str, Any]] = {
    "segformer": {
        "depths": [1, 1],
        "num_encoder_blocks": 2,
        "hidden_sizes": [16, 32],
        "num_attention_heads": [1, 2],
        "sr_ratios": [2, 1],
        "patch_sizes": [3, 3],
        "strides": [2, 2],
        "mlp_ratios": [2, 2],
        "decoder_hidden_size": 32,
        "initializer_range": 0.2,
    },
    "yolos": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "image_size": [PIXELS, PIXELS],
        "patch_size": 8,
        "num_detection_tokens": 6,
        "initializer_range": 0.2,
    },
}


def tiny_detr(kind: str = "detr", **more: Any) -> Any:
    """Return the settings of a small DETR with a ResNet."""
    import transformers

    backbone = transformers.ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16],
        depths=[1, 1],
        layer_type="basic",
        out_features=["stage2"],
    )
    return transformers.AutoConfig.for_model(
        kind,
        backbone_config=backbone,
        d_model=32,
        num_queries=6,
        **dict.fromkeys(("encoder_layers", "decoder_layers"), 1),
        **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2),
        **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 32),
        **more,
    )


def tiny_rt_detr(**more: Any) -> Any:
    """Return the settings of a small RT-DETR."""
    import transformers

    backbone = transformers.RTDetrResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16, 16, 16],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )
    return transformers.RTDetrConfig(
        backbone_config=backbone,
        encoder_in_channels=[16, 16, 16],
        decoder_in_channels=[16, 16, 16],
        **dict.fromkeys(("encoder_hidden_dim", "d_model"), 16),
        **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 32),
        **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2),
        decoder_layers=2,
        decoder_n_points=2,
        num_queries=6,
        num_denoising=4,
        **more,
    )


def stir(model: Any) -> None:
    """Give random values to places and tokens, which begin at zero: a frozen base keeps them."""
    import torch

    for name, parameter in model.named_parameters():
        if name.endswith(("tokens", "token", "position_embeddings")):
            torch.nn.init.normal_(parameter)


def write_tiny_detector(folder: Path, config: Any, *, seed: int = 0) -> None:
    """Write a random model without a head, and a processor that keeps the sides of images."""
    import torch
    import transformers

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.AutoModel.from_config(config)
        stir(model)
    model.save_pretrained(folder)
    size = {"shortest_edge": PIXELS, "longest_edge": 2 * PIXELS}
    transformers.YolosImageProcessorPil(size=size).save_pretrained(folder)


def write_tiny_segformer(folder: Path, *, seed: int = 0, kind: str = "segformer") -> None:
    """Write a random model without a head and its image processor into a folder."""
    import torch
    import transformers

    config = transformers.AutoConfig.for_model(kind, **SIZES[kind])
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.AutoModel.from_config(config)
    model.save_pretrained(folder)
    size = {"height": PIXELS, "width": PIXELS}
    transformers.SegformerImageProcessorPil(size=size).save_pretrained(folder)


def scene(draw: random.Random, *, size: tuple[int, int] = (40, 36)) -> tuple[Any, Any, Any]:
    """Return a picture with a red and a blue rectangle, its mask, and the boxes by colour.

    The mask has 0 for the ground, 1 for red and 2 for blue.
    """
    from PIL import Image

    width, height = size
    picture = Image.new("RGB", size, tuple(draw.randrange(90, 160) for _ in range(3)))
    mask, boxes = Image.new("L", size, 0), {}
    for number, (name, colour) in enumerate(COLOURS.items()):
        wide, high = draw.randrange(10, width // 2 - 2), draw.randrange(10, height - 4)
        left = draw.randrange(width // 2 - wide) + number * width // 2
        top = draw.randrange(height - high)
        box = (left, top, left + wide, top + high)
        picture.paste(colour, box)
        mask.paste(number + 1, box)
        boxes[name] = box
    return picture, mask, boxes


def write_scenes(folder: Path, *, train: int = 24, test: int = 8, seed: int = 0) -> Path:
    """Write train/images/0.png, train/masks/0.png, ..., and validation and test alike."""
    draw = random.Random(seed)
    for split, count in (("train", train), ("validation", test), ("test", test)):
        for name in ("images", "masks"):
            (folder / split / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            picture, mask, _ = scene(draw, size=(40 + number % 3, 36))
            picture.save(folder / split / "images" / f"{number}.png")
            mask.save(folder / split / "masks" / f"{number}.png")
    return folder


def write_boxes(folder: Path, *, train: int = 24, test: int = 8, seed: int = 0) -> Path:
    """Write train.jsonl, ... with objects, and their images in a folder beside them."""
    draw = random.Random(seed)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for split, count in (("train", train), ("validation", test), ("test", test)):
        rows = []
        for number in range(count):
            picture, _, boxes = scene(draw, size=(40 + number % 3, 36))
            name = f"images/{split}-{number}.png"
            picture.save(folder / name)
            sides = [[x, y, right - x, low - y] for x, y, right, low in boxes.values()]
            rows.append({"image": name, "objects": {"bbox": sides, "category": list(boxes)}})
        write_rows(folder / f"{split}.jsonl", rows)
    return folder


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write rows as JSON Lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path

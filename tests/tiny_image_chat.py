"""Random models that chat about images, small enough for tests, and questions about squares."""

import json
import random
from pathlib import Path
from typing import Any

from tiny_vision import png

PIXELS, PATCH = 16, 4
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 40, 230)}
_WORDS = (
    "[PAD]",
    "[UNK]",
    "what",
    "colour",
    "is",
    "it",
    "and",
    "then",
    "this",
    "helpful",
    "a",
    "?",
)
_SPECIAL = (
    *("<s>", "</s>", "<image>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"),
    *("<|image_pad|>", "<|video_pad|>", "<fake_token_around_image>", "<global-img>"),
    *("<row_1_col_1>", "<row_1_col_2>", "<row_2_col_1>", "<row_2_col_2>"),
)
_PART = (
    "{{% if part.type == 'image' %}}{{{{ '{image}' }}}}{{% else %}}{{{{ ' ' + part.text + ' ' }}}}"
    "{{% endif %}}"
)
TEMPLATE = (
    "{{% for m in messages %}}{{{{ '<|im_start|> ' + m.role + ' ' }}}}{{% for part in m.content %}}"
    + _PART
    + "{{% endfor %}}{{{{ '<|im_end|> ' }}}}{{% endfor %}}"
    "{{% if add_generation_prompt %}}{{{{ '<|im_start|> assistant ' }}}}{{% endif %}}"
)
IMAGES = {
    "llava": "<image>",
    "qwen2_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "idefics3": "<image>",
}
VIDEOS = {"video_processor_type": "Qwen2VLVideoProcessor", "merge_size": 2}
_TEXT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 64,
    "max_position_embeddings": 2048,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
_VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": PIXELS,
    "patch_size": PATCH,
    "initializer_range": 0.2,
}


def make_tokenizer() -> Any:
    """Return a tokenizer of words with the special tokens of several models."""
    import transformers
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    words = [*_WORDS, *COLOURS, "user", "assistant", "system"]
    made = Tokenizer(models.WordLevel({w: n for n, w in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens([AddedToken(one, special=True, normalized=False) for one in _SPECIAL])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="[PAD]",
        unk_token="[UNK]",
        bos_token="<s>",
        eos_token="</s>",
        model_input_names=["input_ids", "attention_mask"],
    )


def make_processor(kind: str) -> Any:
    """Return a processor of a model type."""
    import transformers

    from lora_cli.models.image_chat import without_videos

    tokenizer, template = make_tokenizer(), TEMPLATE.format(image=IMAGES[kind])
    side = {"height": PIXELS, "width": PIXELS}
    if kind == "llava":
        return transformers.LlavaProcessor(
            transformers.CLIPImageProcessorPil(size=side, crop_size=side),
            tokenizer,
            patch_size=PATCH,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            chat_template=template,
        )
    if kind == "idefics3":
        images = transformers.Idefics3ImageProcessorPil(
            size={"longest_edge": 2 * PIXELS}, max_image_size={"longest_edge": PIXELS}
        )
        return transformers.Idefics3Processor(
            images, tokenizer, image_seq_len=4, chat_template=template
        )
    images = transformers.Qwen2VLImageProcessorPil(
        patch_size=PATCH, merge_size=2, min_pixels=64, max_pixels=PIXELS**2
    )
    return without_videos(transformers.Qwen2VLProcessor)(images, tokenizer, chat_template=template)


def make_config(kind: str, tokenizer: Any) -> Any:
    """Return the settings of a model of a few thousand weights."""
    import transformers

    number = tokenizer.convert_tokens_to_ids
    text = {
        **_TEXT,
        "vocab_size": len(tokenizer),
        "bos_token_id": number("<s>"),
        "eos_token_id": number("</s>"),
    }
    if kind == "llava":
        return transformers.LlavaConfig(
            vision_config={"model_type": "clip_vision_model", **_VISION},
            text_config={"model_type": "llama", **text},
            image_token_id=number("<image>"),
        )
    if kind == "idefics3":
        return transformers.Idefics3Config(
            vision_config=_VISION,
            text_config={"model_type": "llama", **text},
            image_token_id=number("<image>"),
            scale_factor=2,
        )
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    return transformers.Qwen2VLConfig(
        text_config={**text, "rope_parameters": rope},
        vision_config={
            **{"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2},
            **{"patch_size": PATCH, "spatial_merge_size": 2, "temporal_patch_size": 2},
            "initializer_range": 0.2,
        },
        image_token_id=number("<|image_pad|>"),
        video_token_id=number("<|video_pad|>"),
        vision_start_token_id=number("<|vision_start|>"),
        vision_end_token_id=number("<|vision_end|>"),
    )


def write_tiny_image_chat(folder: Path, kind: str, *, seed: int = 0) -> None:
    """Write a random model and its processor into a folder."""
    import torch
    import transformers

    processor = make_processor(kind)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        auto = transformers.AutoModelForImageTextToText
        model = auto.from_config(make_config(kind, processor.tokenizer))
    model.save_pretrained(folder)
    if kind == "qwen2_vl":
        processor.video_settings = VIDEOS
    processor.save_pretrained(folder)


def square(colour: str, draw: random.Random, *, size: tuple[int, int] = (20, 18)) -> bytes:
    """Return a PNG of one colour with a little noise."""
    from PIL import Image

    noise = [
        tuple(c + draw.randint(-20, 20) for c in COLOURS[colour]) for _ in range(size[0] * size[1])
    ]
    picture = Image.new("RGB", size)
    picture.putdata(noise)
    return png(picture)


def write_squares(folder: Path, *, train: int = 48, test: int = 9, seed: int = 0) -> Path:
    """Write images and rows of several shapes: one image and two, with marks and without."""
    draw = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", train), ("validation", test), ("test", test)):
        rows = []
        for number in range(count):
            colours = [draw.choice(list(COLOURS)) for _ in range(1 + (number % 3 == 2))]
            names = [f"{split}-{number}-{n}.png" for n in range(len(colours))]
            for name, colour in zip(names, colours, strict=True):
                size = (draw.randint(12, 40), draw.randint(12, 40))
                (folder / name).write_bytes(square(colour, draw, size=size))
            mark = "<image>" if number % 3 else ""
            turns = [("user", f"{mark} what colour is it ?"), ("assistant", f"it is {colours[0]}")]
            if len(colours) == 2:
                turns += [("user", "<image>\nand this ?"), ("assistant", f"it is {colours[1]}")]
            messages = [{"role": role, "content": text} for role, text in turns]
            rows.append(json.dumps({"images": names, "messages": messages}) + "\n")
        (folder / f"{split}.jsonl").write_text("".join(rows), encoding="utf-8")
    return folder

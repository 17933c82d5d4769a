"""A processor of images and texts for a small random model, and its configuration made to suit."""

from collections.abc import Callable
from typing import Any

import transformers

from lora_cli.errors import Problem, UserError
from lora_cli.models.image_chat import without_videos

# Patches at a side of an image.
_PATCHES = 4
_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {% for part in message.content %}"
    "{{ image_text if part.type == 'image' else part.text }}{% endfor %}[SEP]{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
_QWEN = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}
_GEMMA = {
    "boi_token": "<start_of_image>",
    "eoi_token": "<end_of_image>",
    "image_token": "<image_soft_token>",
}


def make_image_chat_processor(config: Any, tokenizer: Any) -> Any:
    """Return a processor for a model.

    Args:
        config: Of the model. Its images become small, and its marks those of the processor, in
            place.
        tokenizer: Of its texts; it is given the marks of images.

    Raises:
        UserError: If none is known for the architecture.
    """
    make = _MAKERS.get(config.model_type)
    if make is None:
        raise UserError(_unknown(config.model_type))
    vision = config.vision_config
    if hasattr(vision, "image_size"):
        vision.image_size = _PATCHES * vision.patch_size
    return make(config, tokenizer)


def _llava(config: Any, tokenizer: Any) -> Any:
    _name_marks(config, tokenizer, {"image_token_id": "<image>"})
    size = config.vision_config.image_size
    side = {"height": size, "width": size}
    images: dict[str, Any] = {"size": {"shortest_edge": size}, "crop_size": side}
    kind: Any = transformers.LlavaProcessor
    make_images: Any = transformers.CLIPImageProcessorPil
    if config.model_type == "llava_next":
        config.image_grid_pinpoints = [[size, 2 * size], [2 * size, size]]
        images["image_grid_pinpoints"] = config.image_grid_pinpoints
        kind = transformers.LlavaNextProcessor
        make_images = transformers.LlavaNextImageProcessorPil
    return kind(
        make_images(**images),
        tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        # The first state of a vision tower such as CLIP's is that of a whole image.
        num_additional_image_tokens=1,
        chat_template=_template("<image>"),
    )


def _qwen(config: Any, tokenizer: Any) -> Any:
    _name_marks(config, tokenizer, _QWEN)
    vision = config.vision_config
    side = _PATCHES * vision.patch_size
    images = transformers.Qwen2VLImageProcessorPil(
        patch_size=vision.patch_size,
        temporal_patch_size=vision.temporal_patch_size,
        merge_size=vision.spatial_merge_size,
        min_pixels=side**2 // 4,
        max_pixels=side**2,
    )
    kinds = {
        "qwen2_vl": transformers.Qwen2VLProcessor,
        "qwen2_5_vl": transformers.Qwen2_5_VLProcessor,
        "qwen3_vl": transformers.Qwen3VLProcessor,
    }
    template = _template("<|vision_start|><|image_pad|><|vision_end|>")
    return without_videos(kinds[config.model_type])(images, tokenizer, chat_template=template)


def _idefics(config: Any, tokenizer: Any) -> Any:
    _name_marks(config, tokenizer, {"image_token_id": "<image>"})
    tokenizer.add_special_tokens(
        {"extra_special_tokens": ["<fake_token_around_image>", "<global-img>"]},
        replace_extra_special_tokens=False,
    )
    size = {"longest_edge": config.vision_config.image_size}
    images = transformers.Idefics3ImageProcessorPil(
        size=size, max_image_size=size, do_image_splitting=False
    )
    length = (_PATCHES // config.scale_factor) ** 2
    return transformers.Idefics3Processor(
        images, tokenizer, image_seq_len=length, chat_template=_template("<image>")
    )


def _gemma(config: Any, tokenizer: Any) -> Any:
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        model_input_names=tokenizer.model_input_names,
        extra_special_tokens=_GEMMA,
        **tokenizer.special_tokens_map,
    )
    for name, token in _GEMMA.items():
        setattr(config, f"{name}_index", tokenizer.convert_tokens_to_ids(token))
    config.mm_tokens_per_image = (_PATCHES // 2) ** 2
    size = config.vision_config.image_size
    images = transformers.Gemma3ImageProcessorPil(size={"height": size, "width": size})
    return transformers.Gemma3Processor(
        images,
        tokenizer,
        image_seq_length=config.mm_tokens_per_image,
        chat_template=_template(_GEMMA["boi_token"]),
    )


_MAKERS: dict[str, Callable[[Any, Any], Any]] = {
    "llava": _llava,
    "llava_next": _llava,
    "qwen2_vl": _qwen,
    "qwen2_5_vl": _qwen,
    "qwen3_vl": _qwen,
    "idefics3": _idefics,
    "gemma3": _gemma,
}


def _name_marks(config: Any, tokenizer: Any, marks: dict[str, str]) -> None:
    """Add marks to a tokenizer, and tell a configuration their numbers, by setting."""
    tokenizer.add_special_tokens({"extra_special_tokens": list(marks.values())})
    for name, token in marks.items():
        setattr(config, name, tokenizer.convert_tokens_to_ids(token))


def _template(image: str) -> str:
    return "{% set image_text = '" + image + "' %}" + _TEMPLATE


def _unknown(architecture: str) -> Problem:
    return Problem(
        id="smoke.no-tiny-processor",
        message="`smoke=true` must have a processor of images and texts, but none can be made up "
        f"for {architecture}.",
        key="smoke",
        allowed=", ".join(_MAKERS),
        fix="download the model: its own processor is used then",
    )

"""A small random model of an architecture, and a tokenizer for it: enough to try a recipe with.

Layers keep their number and their names, so that everything which names them means the same as on
the real model; only their width shrinks.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers

from lora_cli.errors import Problem, UserError, nearest_name
from lora_cli.models.base import LOAD_ERRORS, silence
from lora_cli.models.processors import tokenizer_of
from lora_cli.models.spoken_languages import LANGUAGES, prompt_tokens, special_tokens
from lora_cli.models.tiny_image_chat import make_image_chat_processor

_HEADS = 4
_VOCABULARY = 2000
_PIXELS, _SMALL_PIXELS = 224, 64
_CONVOLUTIONS = 32
_SPECIAL = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
_CHAT = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}[SEP]{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
# Names of the same thing in configurations of transformers, without those that are mapped.
_WIDTHS = ("hidden_size", "embedding_size", "pooler_hidden_size", "projection_size")
_INNER = (
    *("intermediate_size", "n_inner", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff"),
    *("hidden_dim", "moe_intermediate_size", "shared_expert_intermediate_size"),
)
_HEAD_COUNTS = ("num_attention_heads", "encoder_attention_heads", "decoder_attention_heads")
_HEAD_WIDTHS = ("head_dim", "d_kv")
_EXPERTS = {
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    "num_experts_per_tok": 2,
}
# What has a length for each place of a head: the plain rotation has none.
_BY_PLACE = ("long_factor", "short_factor")


def default_config(architecture: str, *, layers: int | None, positions: int) -> Any:
    """Return the configuration that transformers has for an architecture.

    Args:
        architecture: Model type, such as bert.
        layers: Number of layers; None takes the usual one.
        positions: Tokens that a row may have at least.

    Raises:
        UserError: If transformers has no such architecture.
    """
    sizes: dict[str, Any] = {} if layers is None else {"num_hidden_layers": layers}
    try:
        kind = transformers.CONFIG_MAPPING[architecture]
        if "text_config" in getattr(kind, "sub_configs", {}):
            # The number is that of the language model.
            sizes = {"text_config": sizes}
        config = transformers.AutoConfig.for_model(architecture, **sizes)
    except (KeyError, ValueError) as error:
        known = sorted(transformers.CONFIG_MAPPING.keys())
        raise UserError(_unknown(architecture, known)) from error
    most = getattr(config, "max_position_embeddings", None)
    if isinstance(most, int) and most < positions:
        config.max_position_embeddings = positions
    if getattr(getattr(config, "backbone_config", None), "model_type", "") == "timm_backbone":
        # Those need a package of their own; released models have transformers' ResNet as well.
        last = {"out_features": ["stage4"]}
        config.backbone_config = transformers.AutoConfig.for_model("resnet", **last)
        config.use_timm_backbone = False
    return config


def make_processor(kind: str, config: Any, texts: Iterable[str]) -> Any:
    """Return a processor for a model.

    Args:
        kind: One of `lora_cli.models.folders.PROCESSOR_FILES` or `PROCESSOR_PARTS`.
        config: Of the model; some of its sizes are changed in place where images are chatted about.
        texts: Of the rows, for a tokenizer.
    """
    if kind == "tokenizer":
        return make_tokenizer(texts)
    if kind == "image chat processor":
        return make_image_chat_processor(config, make_tokenizer(texts))
    if kind == "feature extractor":
        return _make_feature_extractor(config)
    if kind == "image and text processor":
        return _make_image_and_text_processor(config, texts)
    if kind == "speech processor":
        return transformers.WhisperProcessor(
            _make_feature_extractor(config), make_speech_tokenizer(texts, languages=())
        )
    size = getattr(getattr(config, "vision_config", config), "image_size", _PIXELS)
    if isinstance(size, list | tuple):
        # Detectors read images of any size.
        sides = {"shortest_edge": _SMALL_PIXELS, "longest_edge": 2 * _SMALL_PIXELS}
        return transformers.YolosImageProcessorPil(size=sides)
    if isinstance(getattr(config, "depths", None), list | tuple):
        # Models of stages take images of any size, and begin with very small patches.
        size = _SMALL_PIXELS
    return transformers.ViTImageProcessorPil(size={"height": size, "width": size})


def _make_image_and_text_processor(config: Any, texts: Iterable[str]) -> Any:
    """Return what makes the inputs of a model of images and texts."""
    sigmoid = config.model_type.startswith("siglip")
    kind = transformers.SiglipProcessor if sigmoid else transformers.CLIPProcessor
    return kind(
        image_processor=make_processor("image processor", config, ()),
        tokenizer=make_tokenizer(texts),
    )


def _make_feature_extractor(config: Any) -> Any:
    """Return what makes the inputs of a model of sounds, at 16 kHz."""
    match config.model_type:
        case "whisper":
            return transformers.WhisperFeatureExtractor(feature_size=config.num_mel_bins)
        case "audio-spectrogram-transformer":
            return transformers.ASTFeatureExtractor(
                num_mel_bins=config.num_mel_bins, max_length=config.max_length
            )
    # Those with a group norm were trained without masks.
    has_mask = getattr(config, "feat_extract_norm", "layer") == "layer"
    return transformers.Wav2Vec2FeatureExtractor(return_attention_mask=has_mask)


def make_tokenizer(texts: Iterable[str]) -> Any:
    """Return a WordPiece tokenizer that was trained on some texts, in any language.

    It has a chat template too.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

    special = list(_SPECIAL.values())
    pieces = Tokenizer(models.WordPiece(unk_token=_SPECIAL["unk_token"]))
    pieces.normalizer = normalizers.BertNormalizer(lowercase=False, strip_accents=False)
    pieces.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    pieces.train_from_iterator(
        texts,
        trainers.WordPieceTrainer(
            vocab_size=_VOCABULARY, special_tokens=special, show_progress=False
        ),
    )
    first, last = _SPECIAL["cls_token"], _SPECIAL["sep_token"]
    pieces.post_processor = processors.TemplateProcessing(
        single=f"{first} $A {last}",
        pair=f"{first} $A {last} $B:1 {last}:1",
        special_tokens=[(name, special.index(name)) for name in (first, last)],
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=pieces,
        bos_token=first,
        eos_token=last,
        # Not all architectures have types of tokens.
        model_input_names=["input_ids", "attention_mask"],
        chat_template=_CHAT,
        **_SPECIAL,
    )


def make_speech_tokenizer(texts: Iterable[str], *, languages: Iterable[str] = LANGUAGES) -> Any:
    """Return a tokenizer of Whisper's kind, of bytes, that was trained on some texts.

    Args:
        texts: In any language.
        languages: Codes of those that it has tokens for, in Whisper's order.
    """
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers

    pieces = Tokenizer(models.BPE())
    pieces.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pieces.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=_VOCABULARY,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    made = json.loads(pieces.to_str())["model"]
    merges = [tuple(pair) for pair in made["merges"]]
    tokenizer = transformers.WhisperTokenizer(vocab=made["vocab"], merges=merges)
    names = special_tokens(languages)
    tokenizer.add_tokens([AddedToken(name, special=True) for name in names])
    tokenizer.pad_token = tokenizer.eos_token
    # The tokens that texts begin with have numbers now.
    tokenizer.set_prefix_tokens()
    return tokenizer


def write_tiny_model(
    folder: Path, config: Any, processor: Any, *, auto_class: str, width: int, seed: int
) -> None:
    """Write a random model into a folder, as any base model is.

    Args:
        folder: Where to.
        config: Of the real model; it is changed in place.
        processor: Of the model; what the configuration says of tokens is made to suit its
            tokenizer, if it has one.
        auto_class: The transformers class for a model that names no class of its own.
        width: Size of a hidden state, a multiple of 8.
        seed: Decides the weights.

    Raises:
        UserError: If no such model can be made.
    """
    shrink(config, width=width)
    if (tokenizer := tokenizer_of(processor)) is not None:
        _suit_tokens(config, tokenizer)
    names = getattr(config, "architectures", None) or ()
    own = getattr(transformers, names[0], None) if names else None
    try:
        with silence(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            # One without the head of the task is refused where the model is read.
            factory = getattr(transformers, auto_class)
            factory = factory if type(config) in factory._model_mapping else transformers.AutoModel
            model = factory.from_config(config) if own is None else own(config)
            model.to(config.dtype or torch.float32).save_pretrained(folder)
            processor.save_pretrained(folder)
    except LOAD_ERRORS as error:
        raise UserError(_not_made(config.model_type, error)) from error


def shrink(config: Any, *, width: int) -> None:
    """Make a configuration one of narrow layers, in place, with as many of them as before.

    Args:
        config: Of any architecture of transformers, also of one that has parts.
        width: Size of a hidden state.
    """
    for part in getattr(config, "sub_configs", {}):
        if getattr(config, part, None) is not None:
            shrink(getattr(config, part), width=width)
    heads, groups = (_size(config, f"num_{name}_heads") for name in ("attention", "key_value"))
    sizes = {
        **dict.fromkeys(_WIDTHS, width),
        **dict.fromkeys(_INNER, 2 * width),
        **dict.fromkeys(_HEAD_COUNTS, _HEADS),
        "num_key_value_heads": _HEADS if groups == heads else min(groups or 0, 2),
        **dict.fromkeys(_HEAD_WIDTHS, width // _HEADS),
        **{name: min(_size(config, name) or 0, most) for name, most in _EXPERTS.items()},
    }
    for name, size in sizes.items():
        if _size(config, name) is not None:
            setattr(config, name, size)
    _shrink_stages(config, width=width)
    if isinstance(getattr(config, "conv_dim", None), list | tuple):
        # Convolutions that a model of sounds begins with.
        config.conv_dim = [_CONVOLUTIONS] * len(config.conv_dim)
    if _size(config, "spatial_merge_size") is not None:
        # The vision tower of Qwen's models has other names for its sizes.
        config.num_heads = _HEADS
        for name in ("embed_dim", "out_hidden_size"):
            if _size(config, name) is not None:
                setattr(config, name, width)
    _shrink_rotation(config, width=width)


def _shrink_rotation(config: Any, *, width: int) -> None:
    """Make the rotation of positions suit narrow heads, in place."""
    rope = getattr(config, "rope_parameters", None)
    if not isinstance(rope, dict):
        return
    if any(name in rope for name in _BY_PLACE):
        config.rope_parameters = {"rope_type": "default", "rope_theta": rope["rope_theta"]}
    if config.model_type.endswith("_vl_text"):
        # Shares of half a head, for time, height and width.
        half = width // _HEADS // 2
        side = half * 3 // 8
        rope["mrope_section"] = [half - 2 * side, side, side]


def _shrink_stages(config: Any, *, width: int) -> None:
    """Make a configuration of stages, as Swin and ConvNeXt have, one of narrow stages, in place."""
    depths = getattr(config, "depths", None)
    if not isinstance(depths, list | tuple):
        return
    if isinstance(getattr(config, "hidden_sizes", None), list | tuple):
        config.hidden_sizes = [width] * len(depths)
    if _size(config, "embed_dim") is not None:
        config.embed_dim, config.hidden_size = width, width * 2 ** (len(depths) - 1)
    if isinstance(getattr(config, "num_heads", None), list | tuple):
        config.num_heads = [_HEADS] * len(depths)
    if isinstance(getattr(config, "num_attention_heads", None), list | tuple):
        config.num_attention_heads = [_HEADS] * len(depths)
    config.image_size = _SMALL_PIXELS
    if _size(config, "window_size") is not None:
        # The last stage of such images has two patches a side.
        config.window_size = 2


def _suit_tokens(config: Any, tokenizer: Any) -> None:
    """Make the vocabulary as large as it must be, and name no token that is not in it."""
    text, count = config.get_text_config(), len(tokenizer)
    text.vocab_size = config.vocab_size = count
    if hasattr(config, "decoder_vocab_size"):
        config.decoder_vocab_size = count
    if isinstance(tokenizer, transformers.WhisperTokenizer):
        config.decoder_start_token_id = prompt_tokens(tokenizer)[0]
        config.begin_suppress_tokens = config.suppress_tokens = None
    for name in ("pad", "bos", "eos"):
        setattr(text, f"{name}_token_id", getattr(tokenizer, f"{name}_token_id"))
    for part in (config, text):
        for name, value in list(vars(part).items()):
            if name.endswith("_token_id") and isinstance(value, int) and value >= count:
                setattr(part, name, tokenizer.pad_token_id)


def _size(config: Any, name: str) -> int | None:
    """Return a size that a configuration holds, but not one that it works out from others."""
    value = vars(config).get(config.attribute_map.get(name, name))
    return value if isinstance(value, int) else None


def _unknown(architecture: str, known: list[str]) -> Problem:
    near = nearest_name(architecture, known)
    return Problem(
        id="model.unknown-architecture",
        message="`model.architecture` must be a model type of transformers, but is "
        f'"{architecture}".',
        key="model.architecture",
        allowed="model_type of the model's config.json, such as bert, roberta or llama",
        fix=f'did you mean "{near}"?' if near else "see model_type in the model's config.json",
    )


def _not_made(architecture: str, error: Exception) -> Problem:
    return Problem(
        id="smoke.no-tiny-model",
        message=f"`smoke=true` must make a small model of the architecture, but {architecture} "
        f"cannot be made narrow ({type(error).__name__}: {str(error)[:200]}).",
        key="smoke",
        fix="name a small model of this architecture: model.path=DIR trainer.max_steps=2",
    )

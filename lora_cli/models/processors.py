"""What turns the inputs of rows into those of a model: tokenizers, and processors of media.

Whatever it is, it is loaded from the base model's folder, saved beside what was trained, and hashed
with the settings of the base.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn
from transformers import PreTrainedTokenizerBase, WhisperTokenizer
from transformers.image_processing_base import ImageProcessingMixin

from lora_cli import packages
from lora_cli.errors import Problem, UserError
from lora_cli.models.base import (
    agree_on_padding,
    check_vocabulary,
    first_line,
    let_pad,
    load_tokenizer,
    silence,
)
from lora_cli.models.folders import KEY
from lora_cli.models.image_chat import ImageChatProcessor
from lora_cli.models.sources import ModelSource
from lora_cli.models.spoken_languages import agree_on_language

# By kind: the class that loads it, and the module and extra that it needs.
_LOADERS = {
    "image processor": ("AutoImageProcessor", "PIL", "vision"),
    "feature extractor": ("AutoFeatureExtractor", "soundfile", "audio"),
    "image and text processor": ("AutoProcessor", "PIL", "vision"),
    "speech processor": ("AutoProcessor", "soundfile", "audio"),
    "image chat processor": (ImageChatProcessor.__name__, "PIL", "vision"),
}


def load_processor(source: ModelSource, kind: str) -> Any:
    """Load the processor of a base model.

    Args:
        source: What `resolve_model` found.
        kind: One of `lora_cli.models.folders.PROCESSOR_FILES` or `PROCESSOR_PARTS`.

    Raises:
        UserError: If it cannot be loaded, or an extra is not installed.
    """
    if kind == "tokenizer":
        return load_tokenizer(source)
    loader, module, extra = _LOADERS[kind]
    name = f"a{'n' * (kind[0] in 'aeiou')} {kind}"
    packages.check_extra(module, extra=extra, needed_by=f"A model with {name}")
    try:
        with silence():
            factory = getattr(transformers, loader, ImageChatProcessor)
            processor = factory.from_pretrained(
                source.folder, local_files_only=True, trust_remote_code=False
            )
    # Validation may raise classes of huggingface_hub's own.
    except Exception as error:
        raise UserError(
            Problem(
                id="model.bad-processor",
                message=f"`{KEY}` must name a model with {name} that transformers can load, "
                f"but {first_line(error)}.",
                key=KEY,
                where=str(source.folder),
                fix="install that package"
                if isinstance(error, ImportError)
                else "download the model again, or name another",
            )
        ) from error
    if (tokenizer := tokenizer_of(processor)) is not None:
        # Rows are tokenized whole, so its warning of long ones would be wrong.
        warned = tokenizer.deprecation_warnings
        warned["sequence-length-is-longer-than-the-specified-maximum"] = True
        let_pad(tokenizer, source)
    return processor


def tokenizer_of(processor: Any) -> Any:
    """Return the tokenizer that a processor is or has, else None."""
    if isinstance(processor, PreTrainedTokenizerBase):
        return processor
    return getattr(processor, "tokenizer", None)


def agree_with(processor: Any, model: nn.Module, source: ModelSource) -> None:
    """Check that processor and model suit each other, and tell the model of padding, in place.

    Raises:
        UserError: If the tokenizer or the processor is another model's, or what is spoken does not
            suit the model.
    """
    _check_loss(processor, model, source)
    tokenizer, kind = tokenizer_of(processor), getattr(model, "config", None)
    # A model that says letters at each moment reads no tokens.
    reads = not hasattr(processor, "feature_extractor")
    if tokenizer is None or not (reads or getattr(kind, "is_encoder_decoder", False)):
        return
    check_vocabulary(tokenizer, model, source)
    # All texts of SigLIP have one length, filled up where they were filled up before.
    if not is_sigmoid(processor):
        agree_on_padding(tokenizer, model)
    if isinstance(tokenizer, WhisperTokenizer):
        agree_on_language(tokenizer, model)


def _check_loss(processor: Any, model: nn.Module, source: ModelSource) -> None:
    if hasattr(model, "logit_scale") and hasattr(model, "logit_bias") != is_sigmoid(processor):
        raise UserError(
            Problem(
                id="model.other-processor",
                message=f"`{KEY}` must name a model with its own processor, but this "
                f"{type(model).__name__} comes with a {type(processor).__name__}.",
                key=KEY,
                where=str(source.folder),
                fix="copy the processor's files of the model into the folder",
            )
        )


def is_sigmoid(processor: Any) -> bool:
    """Whether a processor is that of SigLIP: pairs are told apart one by one, by a sigmoid.

    Such models were trained on texts that are padded to one length.
    """
    return isinstance(processor, transformers.SiglipProcessor | transformers.Siglip2Processor)


def processor_facts(processor: Any) -> Mapping[str, Any]:
    """Return what decides about encoding and is in no file of the model, as JSON values."""
    tokenizer = tokenizer_of(processor)
    if tokenizer is None:
        return {}
    return {
        "added": tokenizer.get_added_vocab(),
        "template": getattr(tokenizer, "chat_template", None),
        "sides": [tokenizer.padding_side, tokenizer.truncation_side],
    }


def sample_inputs(processor: Any) -> Mapping[str, torch.Tensor]:
    """Return what a processor makes of two made-up rows; of texts, more than 3 tokens."""
    if isinstance(processor, PreTrainedTokenizerBase):
        return dict(processor(["one two three four", "five"], padding=True, return_tensors="pt"))
    process: Any = processor
    if isinstance(processor, ImageProcessingMixin):
        grey = np.full((48, 64, 3), 127, np.uint8)
        return dict(process(images=[grey, grey], return_tensors="pt"))
    if hasattr(process, "image_processor"):
        texts = sample_inputs(process.tokenizer)
        return {**sample_inputs(process.image_processor), **texts}
    rate = getattr(process, "feature_extractor", process).sampling_rate
    second = np.zeros(rate, np.float32)
    return dict(process([second, second], sampling_rate=rate, return_tensors="pt"))

"""Models that always look at the same number of seconds, cut down to fewer.

Whisper reads 30 seconds and AST about 10, whatever the length of a sound, and silence fills the
rest. Cut to a window of s seconds, they keep the embeddings of the positions in the first s
seconds, which are the ones that a short sound had before. The weights are the same and the
function is not: attention, and the mean over positions or the decoder, no longer see the silence.
So the window is part of the model from its loading on: it is trained so, and so it is saved.
"""

import math
from typing import Any

import torch
from torch import nn

# Whisper: 100 frames of its spectrum a second, two of which are a position. AST: 100 frames.
WHISPER_POSITIONS = 50
_AST_FRAMES = 100


def window_seconds(processor: Any) -> float:
    """Return the seconds that a feature extractor fills; infinity where it takes sounds as long.

    Args:
        processor: Of the model.
    """
    match type(processor).__name__:
        case "WhisperFeatureExtractor":
            return float(processor.chunk_length)
        case "ASTFeatureExtractor":
            return float(processor.max_length / _AST_FRAMES)
    return math.inf


def cut_processor(processor: Any, seconds: int) -> None:
    """Make a feature extractor fill no more than so many seconds, in place."""
    match type(processor).__name__:
        case "WhisperFeatureExtractor":
            processor.chunk_length = min(processor.chunk_length, seconds)
            processor.n_samples = processor.chunk_length * processor.sampling_rate
            processor.nb_max_frames = processor.n_samples // processor.hop_length
        case "ASTFeatureExtractor":
            processor.max_length = min(processor.max_length, seconds * _AST_FRAMES)


def cut_model(model: Any, seconds: int) -> None:
    """Make a model look at no more than so many seconds, in place; others are left as they are."""
    match model.config.model_type:
        case "whisper":
            _cut_whisper(model, seconds * WHISPER_POSITIONS)
        case "audio-spectrogram-transformer":
            _cut_ast(model, seconds * _AST_FRAMES)


def _cut_whisper(model: Any, positions: int) -> None:
    """Keep the first positions of the encoder, which are constants."""
    encoder = model.get_encoder()
    if positions >= model.config.max_source_positions:
        return
    kept = encoder.embed_positions.weight.detach()[:positions].clone()
    encoder.embed_positions = nn.Embedding.from_pretrained(kept, freeze=True)
    encoder.max_source_positions = model.config.max_source_positions = positions


def _cut_ast(model: Any, frames: int) -> None:
    """Keep the patches of the first frames: positions are 2 of its own, then (frequency, time)."""
    embeddings = model.audio_spectrogram_transformer.embeddings
    if frames >= model.config.max_length:
        return
    high, wide = embeddings.get_shape(model.config)
    model.config.max_length = frames
    _, kept = embeddings.get_shape(model.config)
    own, patches = embeddings.position_embeddings.detach().split([2, high * wide], dim=1)
    grid = patches.unflatten(1, (high, wide))[:, :, :kept].flatten(1, 2)
    embeddings.position_embeddings = nn.Parameter(torch.cat([own, grid], dim=1))

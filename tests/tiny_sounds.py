"""Small random models of sounds, and files of tones to train them on."""

import json
import random
import wave
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from lora_cli.models.tiny import make_speech_tokenizer

LABELS = ("low", "high")
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "conv_dim": (16, 16, 16),
    "conv_kernel": (10, 4, 4),
    "conv_stride": (8, 4, 4),
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "classifier_proj_size": 16,
    "initializer_range": 0.2,
    "vocab_size": 12,
    "layerdrop": 0.0,
    **dict.fromkeys(
        ("hidden_dropout", "attention_dropout", "activation_dropout", "feat_proj_dropout"), 0.0
    ),
}
WHISPER: dict[str, Any] = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "num_mel_bins": 16,
    "vocab_size": 60,
    "classifier_proj_size": 16,
    "init_std": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 3,
}
AST: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "num_mel_bins": 32,
    "max_length": 200,
    "initializer_range": 0.2,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    # With a group norm, and so without masks.
    "wav2vec2": ("wav2vec2", SIZES),
    "hubert": ("hubert", {**SIZES, "feat_extract_norm": "layer"}),
    "wavlm": ("wavlm", {**SIZES, "feat_extract_norm": "layer"}),
    "whisper": ("whisper", WHISPER),
    "ast": ("audio-spectrogram-transformer", AST),
}
WAVES = ("wav2vec2", "hubert", "wavlm")


def extractor(name: str) -> Any:
    """Return the feature extractor of one of `MODELS`."""
    if name == "whisper":
        return transformers.WhisperFeatureExtractor(feature_size=WHISPER["num_mel_bins"])
    if name == "ast":
        return transformers.ASTFeatureExtractor(
            num_mel_bins=AST["num_mel_bins"], max_length=AST["max_length"]
        )
    return transformers.Wav2Vec2FeatureExtractor(return_attention_mask=name != "wav2vec2")


def build(name: str, auto_class: str = "AutoModelForAudioClassification") -> Any:
    """Return a random model of `MODELS`, in evaluation mode."""
    architecture, sizes = MODELS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(architecture, **sizes)
        return getattr(transformers, auto_class).from_config(config).eval()


def write_model(folder: Path, name: str, auto_class: str = "AutoModel") -> Path:
    """Write a random model with its feature extractor, without a head."""
    build(name, auto_class).save_pretrained(folder)
    extractor(name).save_pretrained(folder)
    return folder


def tone(pitch: float, seconds: float, *, rate: int = 8000, seed: int = 0) -> np.ndarray[Any, Any]:
    """Return a tone with a little noise, float32 of shape (T,)."""
    draw = np.random.default_rng(seed)
    time = np.arange(round(seconds * rate)) / rate
    found = 0.4 * np.sin(2 * np.pi * pitch * time) + 0.02 * draw.standard_normal(len(time))
    return found.astype(np.float32)


def wav(samples: Any, *, rate: int = 8000, channels: int = 1) -> bytes:
    """Return a WAV file of 16 bits."""
    content = BytesIO()
    with wave.open(content, "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((np.asarray(samples) * 32767).astype("<i2").tobytes())
    return content.getvalue()


def write_folder(folder: Path, *, train: int = 24, evaluated: int = 8) -> Path:
    """Write folders of low and high tones of different lengths, for train and validation."""
    for split, count in (("train", train), ("validation", evaluated)):
        for number in range(count):
            label = LABELS[number % 2]
            place = folder / split / label
            place.mkdir(parents=True, exist_ok=True)
            pitch = (200 if label == "low" else 1200) + 7 * number
            content = wav(tone(pitch, 0.3 + 0.05 * (number % 4), seed=number))
            (place / f"{number}.wav").write_bytes(content)
    return folder


def write_rows(folder: Path, rows: list[dict[str, Any]], name: str = "train") -> Path:
    """Write rows as JSON lines."""
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / f"{name}.jsonl").write_text(text)
    return folder


# Each word is a melody of its own, which a model can learn to spell.
WORD_TONES = {"ab": (300, 500), "ba": (500, 300), "cab": (900, 300, 500)}


def melody(text: str, *, rate: int = 8000) -> np.ndarray[Any, Any]:
    """Return a sound for a text of the words of `WORD_TONES`."""
    pause = np.zeros(round(0.08 * rate), np.float32)
    parts = [pause]
    for word in text.split():
        parts += [tone(pitch, 0.1, rate=rate) for pitch in WORD_TONES[word]]
        parts.append(pause)
    return np.concatenate(parts)


def write_speech(folder: Path, *, train: int = 24, evaluated: int = 6) -> Path:
    """Write sounds of melodies with their texts."""
    draw = random.Random(0)
    for split, count in (("train", train), ("validation", evaluated)):
        rows = []
        (folder / "sounds").mkdir(parents=True, exist_ok=True)
        for number in range(count):
            text = " ".join(draw.choices(list(WORD_TONES), k=draw.randint(1, 3)))
            name = f"sounds/{split}-{number}.wav"
            (folder / name).write_bytes(wav(melody(text)))
            rows.append({"audio": name, "text": text})
        write_rows(folder, rows, split)
    return folder


WINDOW = 2
# Of two windows and more.
LONG = "cab ba ab cab ba cab"


def write_whisper(folder: Path, **generation: Any) -> Path:
    """Write a random Whisper with a window of two seconds, and a tokenizer of its kind.

    `generation` is what its generation_config.json says besides.
    """
    extractor = transformers.WhisperFeatureExtractor(
        feature_size=WHISPER["num_mel_bins"], chunk_length=WINDOW
    )
    tokenizer = make_speech_tokenizer([*WORD_TONES, *(f" {word}" for word in WORD_TONES)])
    sizes = {
        **WHISPER,
        "vocab_size": len(tokenizer),
        "max_source_positions": 50 * WINDOW,
        "max_target_positions": 40,
        "decoder_start_token_id": tokenizer.convert_tokens_to_ids("<|startoftranscript|>"),
        "begin_suppress_tokens": None,
        **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), tokenizer.eos_token_id),
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**sizes))
    # Else transformers makes them anew from config.json, where these are not.
    model.generation_config._from_model_config = not generation
    for name, value in generation.items():
        setattr(model.generation_config, name, value)
    model.save_pretrained(folder)
    transformers.WhisperProcessor(extractor, tokenizer).save_pretrained(folder)
    return folder


Writer = Callable[..., Path]

"""Generated speech: digits said by voices of espeak-ng, and a model that is to learn them.

    python benchmarks/spoken_digits.py FOLDER    # writes FOLDER/sounds and FOLDER/model

Rows have one to four digits. They, voices, speeds and pitches are drawn with a fixed seed; no voice
of the test rows is in train. The model has the architecture of Wav2Vec2-BERT, two layers and random
weights: it knows nothing of speech, and adapters and head have to learn all of it. It reads mel
spectrograms, since a random model of waves (wav2vec 2.0, HuBERT) stays silent for longer than a
benchmark should take.
"""

import json
import random
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

PROGRAM = "espeak-ng"
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TRAIN_VOICES = tuple(
    f"{accent}+{voice}"
    for accent in ("en-us", "en-gb")
    for voice in ("m1", "m3", "m7", "f1", "f2", "f4")
)
TEST_VOICES = ("en-us+m4", "en-us+f3")
SPLITS = {
    "train": (1600, TRAIN_VOICES),
    "validation": (60, TRAIN_VOICES),
    "test": (100, TEST_VOICES),
}
MELS = 40
SIZES = {
    "hidden_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 192,
    "feature_projection_input_dim": 2 * MELS,
    "apply_spec_augment": False,
    "layerdrop": 0.0,
    **dict.fromkeys(
        (
            *("hidden_dropout", "attention_dropout", "activation_dropout", "feat_proj_dropout"),
            *("final_dropout", "conformer_conv_dropout"),
        ),
        0.0,
    ),
}


def is_there() -> bool:
    """Whether the program that speaks is installed."""
    return shutil.which(PROGRAM) is not None


def write(folder: Path) -> None:
    """Write `sounds`, a data set, and `model` into a folder; the same each time."""
    write_sounds(folder / "sounds")
    write_model(folder / "model")


def write_sounds(folder: Path) -> None:
    """Write files and rows of each split."""
    draw = random.Random(0)
    for split, (count, voices) in SPLITS.items():
        (folder / split).mkdir(parents=True, exist_ok=True)
        rows = []
        for number in range(count):
            text = " ".join(draw.choices(DIGITS, k=draw.randint(1, 4)))
            voice, speed = draw.choice(voices), draw.randint(130, 190)
            rows.append((f"{split}/{number}.wav", text, voice, speed, draw.randint(30, 70)))
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda row: _say(folder, *row), rows))
        lines = "".join(json.dumps({"audio": row[0], "text": row[1]}) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(lines, encoding="utf-8")


def _say(folder: Path, name: str, text: str, voice: str, speed: int, pitch: int) -> None:
    settings = ["-v", voice, "-s", str(speed), "-p", str(pitch), "-w", str(folder / name)]
    subprocess.run([PROGRAM, *settings, text], check=True, capture_output=True)


def write_model(folder: Path) -> None:
    """Write the model and its feature extractor."""
    import torch
    from transformers import SeamlessM4TFeatureExtractor, Wav2Vec2BertConfig, Wav2Vec2BertModel

    torch.manual_seed(0)
    Wav2Vec2BertModel(Wav2Vec2BertConfig(**SIZES)).save_pretrained(folder)
    SeamlessM4TFeatureExtractor(feature_size=MELS, num_mel_bins=MELS).save_pretrained(folder)


if __name__ == "__main__":
    if not is_there():
        sys.exit(f"error: {PROGRAM} is not installed")
    write(Path(sys.argv[1]))

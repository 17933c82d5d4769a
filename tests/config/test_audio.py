"""Settings of sounds: which family takes them, and their limits."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lora_cli.config.audio import AudioClassificationConfig, SpeechRecognitionSeq2SeqConfig
from lora_cli.config.generation import GenerationConfig
from lora_cli.config.task_families import TASKS


def test_nothing_is_changed_at_random_unless_asked() -> None:
    config = AudioClassificationConfig()
    assert TASKS[config.family] is AudioClassificationConfig
    assert config.augmentation.gain == config.augmentation.noise == 0
    assert config.max_seconds is None


def test_a_decoder_may_write_as_much_as_a_window_holds() -> None:
    config = SpeechRecognitionSeq2SeqConfig()
    assert TASKS[config.family] is SpeechRecognitionSeq2SeqConfig
    assert config.generation == GenerationConfig(max_new_tokens=224)
    assert config.language is None


def test_a_window_is_no_longer_than_that_of_whisper(
    run_cli: Callable[..., Any], tmp_path: Path
) -> None:
    task = ("task=speech_recognition_seq2seq", "task.data.path=x", "task.max_seconds=31")
    finished = run_cli("train", *task, "model.path=y", cwd=tmp_path)
    assert finished.code == 2
    assert "`task.max_seconds` must be" in finished.err


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("task.max_seconds=0", "`task.max_seconds` must be"),
        ("task.augmentation.noise=1.5", "`task.augmentation.noise` must be"),
        ("task.augmentation.gain=-1", "`task.augmentation.gain` must be"),
        ("task.data.text_column=text", "`task.data.text_column`"),
    ],
)
def test_values_are_checked(
    setting: str, said: str, run_cli: Callable[..., Any], tmp_path: Path
) -> None:
    arguments = ["task=audio_classification", "task.data.path=x", "model.path=y", setting]
    finished = run_cli("train", *arguments, cwd=tmp_path)
    assert finished.code == 2
    assert said in finished.err

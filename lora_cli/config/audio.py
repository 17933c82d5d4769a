"""Settings of the task families whose rows have sounds."""

from dataclasses import dataclass, field
from typing import Literal

from lora_cli.config.generation import GenerationConfig
from lora_cli.config.tasks import TaskSection

# Half of what Whisper's decoder can look at, as in its own transcriptions.
_NEW_TOKENS = 224


@dataclass(frozen=True, kw_only=True, slots=True)
class SoundAugmentationConfig:
    """Random changes of sounds in training; evaluation and predictions hear them as they are."""

    gain: float = field(default=0.0, metadata={"min": 0, "max": 40})
    """Decibels by which a sound becomes louder or softer at most; models that scale hear none."""

    noise: float = field(default=0.0, metadata={"min": 0, "max": 1})
    """Chance of adding white noise to a sound; 0 is off."""

    noise_snr: float = field(default=15.0, metadata={"min": -10, "max": 80})
    """Least ratio of sound to noise, in decibels; it is drawn from this and 20 more."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _AudioConfig(TaskSection):
    max_seconds: int | None = field(default=None, metadata={"min": 1, "max": 600})
    """Seconds read of a sound, a random part in training; null: as the longest of train, to 30."""

    augmentation: SoundAugmentationConfig = field(default_factory=SoundAugmentationConfig)


@dataclass(frozen=True, kw_only=True, slots=True)
class SpeechRecognitionCTCConfig(TaskSection):
    """What is said in each sound, letter by letter (CTC)."""

    family: Literal["speech_recognition_ctc"] = "speech_recognition_ctc"

    normalizer: Literal["basic", "none"] = "basic"
    """basic: NFKC, lower case, no punctuation but apostrophes in words; learned and scored so."""

    max_seconds: int = field(default=20, metadata={"min": 11, "max": 600})
    """Longer sounds of train are left out; others are read in chunks of so many seconds."""

    stride_seconds: int = field(default=2, metadata={"min": 1, "max": 5})
    """Seconds that a chunk of a longer sound shares with what stands around it, at each side."""

    augmentation: SoundAugmentationConfig = field(default_factory=SoundAugmentationConfig)

    metric: Literal["wer", "cer"] = "wer"
    """Metric that selects the best checkpoint, the error rate of words or characters; less wins."""


def _generation() -> GenerationConfig:
    return GenerationConfig(max_new_tokens=_NEW_TOKENS)


@dataclass(frozen=True, kw_only=True, slots=True)
class SpeechRecognitionSeq2SeqConfig(TaskSection):
    """What is said in each sound, or its English translation, written by a decoder (Whisper)."""

    family: Literal["speech_recognition_seq2seq"] = "speech_recognition_seq2seq"

    language: str | None = field(default=None, metadata={"text": True})
    """What is spoken, as en or english; null with models of English alone, or as the tokenizer."""

    translate: bool = False
    """Whether the texts are English translations of what is said, not transcripts."""

    normalizer: Literal["basic", "none"] = "basic"
    """basic: NFKC, lower case, no punctuation but apostrophes in words; texts are scored so."""

    max_seconds: int | None = field(default=None, metadata={"min": 1, "max": 30})
    """Seconds of the window; null: the model's own, 30. Fewer are cheaper, and must be learned."""

    max_target_length: int = field(default=448, metadata={"min": 8})
    """Tokens of the language and a transcript at most; rows of train with longer are left out."""

    augmentation: SoundAugmentationConfig = field(default_factory=SoundAugmentationConfig)

    generate_in_eval: bool = True
    """Whether evaluations write texts as well, for wer and cer."""

    generation: GenerationConfig = field(default_factory=_generation)

    metric: Literal["wer", "cer", "loss"] = "wer"
    """Metric that selects the best checkpoint; the error rates need generate_in_eval=true."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AudioClassificationConfig(_AudioConfig):
    """One label for each sound."""

    family: Literal["audio_classification"] = "audio_classification"

    class_weights: Literal["none", "balanced"] = "none"
    """balanced weighs each label in the loss by N / (C n), for C labels with n of N rows each."""

    metric: Literal["accuracy", "macro_f1"] = "accuracy"
    """Metric that selects the best checkpoint; both are reported."""

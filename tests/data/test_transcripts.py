"""Transcripts made alike, spelled and read back, beside the tokenizer of transformers."""

import random

import pytest

from lora_cli.data.transcripts import SPECIAL, build_vocabulary, normalize, read_spelling, spell
from lora_cli.tasks.speech_recognition_ctc import SpeechRecognitionCTC


@pytest.mark.parametrize(
    ("text", "basic", "none"),
    [
        ("Hello, World!", "hello world", "Hello, World!"),
        ("It\u2019s 'quoted'\n twice", "it's quoted twice", "It\u2019s 'quoted' twice"),
        ("\uff21\uff22 x|y", "ab x y", "\uff21\uff22 x y"),
        ("\u4f60\u597d\u3002", "\u4f60\u597d", "\u4f60\u597d\u3002"),
        (" ... ", "", "..."),
    ],
)
def test_texts_are_made_alike(text: str, basic: str, none: str) -> None:
    assert normalize(text, "basic") == basic
    assert normalize(text, "none") == none


def test_letters_are_in_order_whatever_the_order_of_texts() -> None:
    texts = ["b a", "c\u00e9a"]
    expected = [*SPECIAL, "a", "b", "c", "\u00e9"]
    assert build_vocabulary(texts) == build_vocabulary(texts[::-1]) == expected
    assert spell("a xb", expected) == [3, 2, 1, 4]


def test_paths_are_read_as_transformers_does() -> None:
    from transformers import Wav2Vec2FeatureExtractor

    vocabulary = build_vocabulary(["ab c"])
    process = SpeechRecognitionCTC().fit_processor(
        Wav2Vec2FeatureExtractor(), {"vocabulary": vocabulary}
    )
    assert len(process.tokenizer) == len(vocabulary)
    draw = random.Random(0)
    for _ in range(200):
        path = draw.choices([0, 2, 3, 4, 5], [3, 2, 2, 2, 2], k=12)
        words = read_spelling(path, vocabulary)
        assert " ".join(word for word, _, _ in words) == " ".join(process.decode(path).split())
        for word, start, end in words:
            assert vocabulary[path[start]] == word[0]
            assert vocabulary[path[end]] == word[-1]

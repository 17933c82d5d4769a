"""What is written for sounds is what transformers' own Whisper writes from the same tokens."""

from typing import Any

import pytest
import torch
import transformers
from tiny_sounds import melody, write_whisper
from transformers.modeling_outputs import BaseModelOutput

from lora_cli.config.generation import GenerationConfig
from lora_cli.models.spoken_languages import agree_on_language, prompt_tokens, set_spoken_language
from lora_cli.tasks.transcribing import transcribe

TEXTS = ("ab ba", "cab", "ba ba ab")


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = write_whisper(tmp_path_factory.mktemp("whisper"))
    process = transformers.AutoProcessor.from_pretrained(folder)
    model: Any = transformers.AutoModelForSpeechSeq2Seq.from_pretrained(folder).eval()
    set_spoken_language(process.tokenizer, "de", translates=False)
    agree_on_language(process.tokenizer, model)
    waves = [melody(text, rate=16000) for text in TEXTS]
    return model, process, process(waves, sampling_rate=16000, return_tensors="pt")


@pytest.mark.parametrize("beams", [1, 3])
def test_it_is_that_of_the_model(beams: int, parts: Any) -> None:
    model, process, inputs = parts
    config = GenerationConfig(max_new_tokens=10, num_beams=beams)
    own, prompt = model.generation_config, prompt_tokens(process.tokenizer)
    ids = [str(number) for number in range(len(TEXTS))]
    found = transcribe(model, process.tokenizer, inputs, config, ids=ids, prompt=prompt)
    assert model.generation_config is own
    expected = model.generate(
        **inputs, max_new_tokens=10, num_beams=beams, early_stopping=False
    ).tolist()
    assert found == expected
    with torch.no_grad():
        states = BaseModelOutput(
            last_hidden_state=model.get_encoder()(inputs["input_features"]).last_hidden_state
        )
    again = transcribe(
        model, process.tokenizer, {"encoder_outputs": states}, config, ids=ids, prompt=prompt
    )
    assert again == found


def test_it_stops_at_the_last_position(parts: Any) -> None:
    model, process, inputs = parts
    prompt = prompt_tokens(process.tokenizer)
    found = transcribe(
        model,
        process.tokenizer,
        inputs,
        GenerationConfig(max_new_tokens=500),
        ids=["a", "b", "c"],
        prompt=prompt,
    )
    assert max(map(len, found)) == model.config.max_target_positions - len(prompt) + 1

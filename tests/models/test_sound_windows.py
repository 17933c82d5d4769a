"""Windows that are cut: the same weights, the positions that a short sound had before."""

import math

import numpy as np
import pytest
import torch
from tiny_sounds import build, extractor, tone
from transformers.modeling_outputs import BaseModelOutput

from lora_cli.models.sound_windows import cut_model, cut_processor, window_seconds


def test_whisper_computes_its_own_layers_on_the_first_positions() -> None:
    model, cut, process = build("whisper"), build("whisper"), extractor("whisper")
    cut_model(cut, 1)
    cut_processor(process, 1)
    inputs = process(tone(440, 0.7, rate=16000), sampling_rate=16000, return_tensors="pt")
    assert inputs["input_features"].shape == (1, 16, 100)
    encoder = model.encoder
    with torch.no_grad():
        found = cut(**inputs).logits
        states = torch.nn.functional.gelu(encoder.conv1(inputs["input_features"]))
        states = torch.nn.functional.gelu(encoder.conv2(states)).transpose(1, 2)
        states = states + encoder.embed_positions.weight[:50]
        for layer in encoder.layers:
            states = layer(states, None)
        states = BaseModelOutput(last_hidden_state=encoder.layer_norm(states))
        expected = model(encoder_outputs=states).logits
        whole = model(
            **extractor("whisper")(
                tone(440, 0.7, rate=16000), sampling_rate=16000, return_tensors="pt"
            )
        ).logits
    assert torch.equal(found, expected)
    # Another function than the whole window, in which silence has a part in the mean.
    assert not torch.allclose(found, whole, atol=1e-3)


def test_ast_keeps_its_own_positions_and_those_of_the_first_frames() -> None:
    model, cut, process = build("ast"), build("ast"), extractor("ast")
    embeddings = [m.audio_spectrogram_transformer.embeddings for m in (model, cut)]
    with torch.no_grad():
        embeddings[0].position_embeddings.normal_()
        embeddings[1].position_embeddings.copy_(embeddings[0].position_embeddings)
    cut_model(cut, 1)
    cut_processor(process, 1)
    inputs = process(tone(440, 0.7, rate=16000), sampling_rate=16000, return_tensors="pt")
    values = inputs["input_values"]
    assert values.shape == (1, 100, 32)
    padded = torch.nn.functional.pad(values, (0, 0, 0, 100))
    with torch.no_grad():
        short, long = embeddings[1](values)[0], embeddings[0](padded)[0]
        assert cut(**inputs).logits.shape == (1, 2)
    high, wide = 2, (100 - 16) // 10 + 1
    all_wide = (200 - 16) // 10 + 1
    assert torch.allclose(short[:2], long[:2])
    grid = long[2:].unflatten(0, (high, all_wide))[:, :wide]
    assert torch.allclose(short[2:].unflatten(0, (high, wide)), grid, atol=1e-6)


@pytest.mark.parametrize(("name", "seconds"), [("whisper", 30), ("ast", 2), ("wav2vec2", 30)])
def test_a_window_does_not_grow(name: str, seconds: int) -> None:
    model, process = build(name), extractor(name)
    before, window = model.state_dict(), window_seconds(process)
    cut_model(model, seconds)
    cut_processor(process, seconds)
    assert window_seconds(process) == window
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_other_models_read_sounds_as_long_as_they_are() -> None:
    assert window_seconds(extractor("hubert")) == math.inf
    process = extractor("whisper")
    cut_processor(process, 2)
    assert window_seconds(process) == 2
    shape = process(np.zeros(80000, np.float32), sampling_rate=16000)["input_features"].shape
    assert shape == (1, 16, 200)

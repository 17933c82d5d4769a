from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from lora_cli.errors import UserError
from lora_cli.models.tiny import (
    default_config,
    make_processor,
    make_speech_tokenizer,
    make_tokenizer,
    shrink,
    write_tiny_model,
)

TEXTS = ["a quiet river in the garden", "今天 天气 很好", "letters, and more letters"]
# With the number of layers that transformers gives each.
USUAL = {
    "bert": 12,
    "distilbert": 6,
    "albert": 12,
    "deberta-v2": 24,
    "modernbert": 22,
    "gpt2": 12,
    "llama": 32,
    "qwen3_moe": 24,
    "t5": 6,
    "bart": 12,
}


def names_of(model: Any) -> list[str]:
    return [name for name, _ in model.named_modules()]


@pytest.mark.parametrize("architecture", USUAL)
def test_a_tiny_model_has_the_layers_of_a_large_one(tmp_path: Path, architecture: str) -> None:
    tokenizer = make_tokenizer(TEXTS)
    config = default_config(architecture, layers=None, positions=64)
    assert config.get_text_config().num_hidden_layers == USUAL[architecture]
    if architecture == "qwen3_moe":
        config.num_hidden_layers = 2  # 128 experts a layer take a while to be named
    with torch.device("meta"):
        real = names_of(transformers.AutoModel.from_config(config))
    write_tiny_model(tmp_path, config, tokenizer, auto_class="AutoModel", width=64, seed=0)
    model, info = transformers.AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    if architecture != "qwen3_moe":
        assert names_of(model) == real
    assert sum(parameter.numel() for parameter in model.parameters()) < 3_000_000
    again = transformers.AutoTokenizer.from_pretrained(tmp_path)
    inputs = again(TEXTS, padding=True, return_tensors="pt")
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs["input_ids"]
    assert torch.isfinite(model.eval()(**inputs)[0]).all()


def test_the_seed_alone_decides_the_weights(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(TEXTS)
    found = []
    for number, seed in enumerate((0, 0, 1)):
        folder = tmp_path / str(number)
        config = default_config("bert", layers=1, positions=64)
        torch.manual_seed(number)
        before = torch.random.get_rng_state()
        write_tiny_model(folder, config, tokenizer, auto_class="AutoModel", width=64, seed=seed)
        assert torch.equal(torch.random.get_rng_state(), before)
        found.append((folder / "model.safetensors").read_bytes())
    assert found[0] == found[1] != found[2]


def test_a_model_of_its_own_class_keeps_head_and_format(tmp_path: Path) -> None:
    config = transformers.BertConfig(
        architectures=["BertForSequenceClassification"],
        num_labels=3,
        num_hidden_layers=1,
        dtype="bfloat16",
        hidden_size=768,
    )
    tokenizer = make_tokenizer(TEXTS)
    write_tiny_model(tmp_path, config, tokenizer, auto_class="AutoModel", width=128, seed=0)
    model: Any = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert (model.dtype, model.config.hidden_size) == (torch.bfloat16, 128)
    assert model.classifier.weight.shape == (3, 128)
    assert model.get_input_embeddings().num_embeddings == len(tokenizer)


def test_a_speech_tokenizer_reads_what_it_writes(tmp_path: Path) -> None:
    make_speech_tokenizer(TEXTS).save_pretrained(tmp_path)
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    # transformers counts languages from the start token.
    tokenizer.set_prefix_tokens(language="haw", task="transcribe")
    names = ["<|startoftranscript|>", "<|haw|>", "<|transcribe|>", "<|notimestamps|>"]
    assert tokenizer.prefix_tokens == tokenizer.convert_tokens_to_ids(names)
    config = default_config("whisper", layers=1, positions=0)
    processor = make_processor("speech processor", config, TEXTS)
    write_tiny_model(
        tmp_path, config, processor, auto_class="AutoModelForSpeechSeq2Seq", width=64, seed=0
    )
    model: Any = transformers.AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path)
    assert "<|en|>" not in processor.tokenizer.get_vocab()
    assert model.config.decoder_start_token_id == processor.tokenizer.prefix_tokens[0]


def test_groups_of_heads_and_positions_stay_possible() -> None:
    config = transformers.Qwen2Config(
        num_attention_heads=14, num_key_value_heads=2, hidden_size=896, num_hidden_layers=1
    )
    shrink(config, width=64)
    assert (config.num_attention_heads, config.num_key_value_heads) == (4, 2)
    config = transformers.Phi3Config(
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "long_factor": [1.0] * 48,
            "short_factor": [1.0] * 48,
        },
        original_max_position_embeddings=4096,
        max_position_embeddings=131072,
        pad_token_id=0,
    )
    shrink(config, width=64)
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}
    assert default_config("bert", layers=None, positions=700).max_position_embeddings == 700
    assert default_config("bert", layers=None, positions=7).max_position_embeddings == 512


def test_architectures_that_cannot_be_made() -> None:
    with pytest.raises(UserError, match='is "robrta"') as error:
        default_config("robrta", layers=None, positions=64)
    assert error.value.problems[0].fix == 'did you mean "roberta"?'
    with pytest.raises(UserError, match="funnel cannot be made narrow"):
        write_tiny_model(
            Path("nowhere"),
            default_config("funnel", layers=None, positions=64),
            make_tokenizer(TEXTS),
            auto_class="AutoModel",
            width=64,
            seed=0,
        )


def test_a_made_tokenizer_reads_any_language_and_tells_words_apart() -> None:
    tokenizer = make_tokenizer(TEXTS)
    found = tokenizer("今天 letters unseen☃", "river")
    words = tokenizer.convert_ids_to_tokens(found["input_ids"])
    assert (words[0], words.count("[SEP]")) == ("[CLS]", 2)
    assert {"今", "天", "letters", "river", "[UNK]"} <= set(words)
    assert found.word_ids()[1] == 0
    assert tokenizer.pad_token_id == 0
    assert tokenizer.mask_token == "[MASK]"


@pytest.mark.parametrize(("kind", "sigmoid"), [("clip", False), ("siglip", True)])
def test_a_dual_encoder_of_any_width(kind: str, sigmoid: bool, tmp_path: Path) -> None:
    config = default_config(kind, layers=None, positions=16)
    processor = make_processor("image and text processor", config, ["a red square"])
    assert isinstance(processor, transformers.SiglipProcessor) == sigmoid
    write_tiny_model(tmp_path, config, processor, auto_class="AutoModel", width=16, seed=0)
    model = transformers.AutoModel.from_pretrained(tmp_path)
    images = processor.image_processor(images=[np.zeros((20, 20, 3), np.uint8)] * 3)
    texts = processor.tokenizer(["a red square", "red"], padding=True)
    given = {**images.convert_to_tensors("pt"), **texts.convert_to_tensors("pt")}
    assert model(**given).logits_per_image.shape == (3, 2)

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoConfig

from lora_cli.models.heads import head_names, output_embeddings


def build(auto_class: str, model_type: str) -> nn.Module:
    with torch.device("meta"):
        model: nn.Module = getattr(transformers, auto_class).from_config(
            AutoConfig.for_model(model_type)
        )
    return model


@pytest.mark.parametrize(
    ("auto_class", "model_type", "heads", "outputs"),
    [
        ("AutoModel", "bert", (), ()),
        ("AutoModelForSequenceClassification", "bert", ("dropout", "classifier"), ()),
        ("AutoModelForMaskedLM", "bert", ("cls",), ("cls.predictions.decoder",)),
        ("AutoModelForCausalLM", "gpt2", ("lm_head",), ("lm_head",)),
        ("AutoModelForSeq2SeqLM", "t5", ("lm_head",), ("lm_head",)),
        ("AutoModelForQuestionAnswering", "t5", ("qa_outputs",), ()),
        ("AutoModelForAudioClassification", "whisper", ("classifier",), ()),
        ("AutoModelForImageClassification", "clip", ("classifier",), ()),
        ("AutoModelForSemanticSegmentation", "segformer", ("decode_head",), ()),
        (
            "AutoModelForObjectDetection",
            "rt_detr",
            ("model.denoising_class_embed", "model.enc_score_head", "model.decoder.class_embed"),
            (),
        ),
        ("AutoModelForImageTextToText", "llava", ("lm_head",), ("lm_head",)),
        # The language model inside has a head of its own.
        (
            "AutoModelForImageTextToText",
            "blip-2",
            ("language_model.lm_head",),
            ("language_model.lm_head",),
        ),
    ],
)
def test_heads_and_outputs(
    auto_class: str, model_type: str, heads: tuple[str, ...], outputs: tuple[str, ...]
) -> None:
    model = build(auto_class, model_type)
    assert head_names(model) == heads
    assert output_embeddings(model) == outputs


def test_plain_modules_have_none() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    assert head_names(model) == output_embeddings(model) == ()

"""Which layers of each model family `lora.targets: auto` adapts.

The query and value projections, as in Hu et al. 2021, section 7.1 (arXiv:2106.09685), or the one
layer that holds them together with the keys. Names are those of transformers 5; where PEFT has a
default for a family, it is the same.
"""

_QUERY_VALUE = ("query", "value")
_Q_V = ("q", "v")
_PROJECTIONS = ("q_proj", "v_proj")
_FUSED = ("query_key_value",)

# A family is added as one row; tests/models/test_families.py builds each and checks the names.
AUTO_TARGETS: dict[str, tuple[str, ...]] = {
    # encoders
    "albert": _QUERY_VALUE,
    "bert": _QUERY_VALUE,
    "big_bird": _QUERY_VALUE,
    "camembert": _QUERY_VALUE,
    "convbert": _QUERY_VALUE,
    "data2vec-text": _QUERY_VALUE,
    "deberta": ("in_proj",),
    "deberta-v2": ("query_proj", "value_proj"),
    "distilbert": ("q_lin", "v_lin"),
    "electra": _QUERY_VALUE,
    "ernie": _QUERY_VALUE,
    "eurobert": _PROJECTIONS,
    "layoutlm": _QUERY_VALUE,
    "longformer": _QUERY_VALUE,
    "luke": _QUERY_VALUE,
    "megatron-bert": _QUERY_VALUE,
    "mobilebert": _QUERY_VALUE,
    "modernbert": ("Wqkv",),
    "mpnet": _Q_V,
    "nomic_bert": _PROJECTIONS,
    "nystromformer": _QUERY_VALUE,
    "rembert": _QUERY_VALUE,
    "roberta": _QUERY_VALUE,
    "roformer": _QUERY_VALUE,
    "xlm-roberta": _QUERY_VALUE,
    "xlm-roberta-xl": _QUERY_VALUE,
    "xmod": _QUERY_VALUE,
    # encoder and decoder
    "bart": _PROJECTIONS,
    "blenderbot": _PROJECTIONS,
    "longt5": _Q_V,
    "m2m_100": _PROJECTIONS,
    "marian": _PROJECTIONS,
    "mbart": _PROJECTIONS,
    "mt5": _Q_V,
    "pegasus": _PROJECTIONS,
    "t5": _Q_V,
    "umt5": _Q_V,
    # decoders
    "bloom": _FUSED,
    "codegen": ("qkv_proj",),
    "cohere": _PROJECTIONS,
    "falcon": _FUSED,
    "gemma": _PROJECTIONS,
    "gemma2": _PROJECTIONS,
    "gemma3": ("*language_model.*.q_proj", "*language_model.*.v_proj"),
    "gemma3_text": _PROJECTIONS,
    "gpt_neo": _PROJECTIONS,
    "gpt_neox": _FUSED,
    "gptj": _PROJECTIONS,
    "granite": _PROJECTIONS,
    "llama": _PROJECTIONS,
    "mistral": _PROJECTIONS,
    "mixtral": _PROJECTIONS,
    "mpt": ("Wqkv",),
    "olmo": _PROJECTIONS,
    "olmo2": _PROJECTIONS,
    "opt": _PROJECTIONS,
    "phi": ("q_proj", "v_proj", "fc1", "fc2"),
    "phi3": ("qkv_proj",),
    "qwen2": _PROJECTIONS,
    "qwen3": _PROJECTIONS,
    "smollm3": _PROJECTIONS,
    "stablelm": _PROJECTIONS,
    "starcoder2": _PROJECTIONS,
    # images, audio, both with text
    "audio-spectrogram-transformer": _PROJECTIONS,
    "beit": _PROJECTIONS,
    "clip": _PROJECTIONS,
    "deit": _PROJECTIONS,
    "dinov2": _PROJECTIONS,
    "hubert": _PROJECTIONS,
    "siglip": _PROJECTIONS,
    "swin": _PROJECTIONS,
    "vit": _PROJECTIONS,
    "vit_mae": _PROJECTIONS,
    "wav2vec2": _PROJECTIONS,
    "wavlm": _PROJECTIONS,
    "whisper": _PROJECTIONS,
}


def auto_targets(model_type: str) -> tuple[str, ...] | None:
    """Return the usual targets of a family, or None when it is not in the table.

    Args:
        model_type: `config.model_type` of the model, such as "bert".
    """
    return AUTO_TARGETS.get(model_type)

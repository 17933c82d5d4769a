"""Random language models, small enough for tests."""

from pathlib import Path
from typing import Any

_DECODER = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
_BOTH = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 64,
    "init_std": 0.2,
    "forced_eos_token_id": None,
}
_SIZES: dict[str, Any] = {
    "llama": {**_DECODER, "num_key_value_heads": 1},
    "qwen2": {**_DECODER, "num_key_value_heads": 1},
    "gpt_neox": _DECODER,
    "gpt2": {
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 2,
        "n_positions": 64,
        "initializer_range": 0.2,
    },
    "t5": {
        "d_model": 32,
        "d_kv": 16,
        "d_ff": 64,
        "num_layers": 2,
        "num_heads": 2,
        "decoder_start_token_id": 0,
        "initializer_factor": 4.0,
        "bos_token_id": None,
    },
    "bart": {**_BOTH, "decoder_start_token_id": 3},
    "mbart": {**_BOTH, "decoder_start_token_id": None},
    "marian": {**_BOTH, "decoder_start_token_id": 0},
}


def write_tiny_language(folder: Path, kind: str, vocabulary: list[str], *, seed: int) -> None:
    """Write a random language model and its tokenizer into a folder."""
    import torch
    import transformers

    words = [token for token in vocabulary if not token.startswith("##")]
    _write_tokenizer(folder, kind, words)
    ids = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "vocab_size": len(words)}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if kind == "bert2bert":
            bert = transformers.BertConfig(**ids, **_DECODER)
            config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(bert, bert)
            model: Any = transformers.EncoderDecoderModel(config=config)
        else:
            config = transformers.AutoConfig.for_model(kind, **{**ids, **_SIZES[kind]})
            is_decoder = kind in ("llama", "gpt2", "qwen2", "gpt_neox")
            auto = "AutoModelForCausalLM" if is_decoder else "AutoModelForSeq2SeqLM"
            model = getattr(transformers, auto).from_config(config)
    model.save_pretrained(folder)


def _write_tokenizer(folder: Path, kind: str, words: list[str]) -> None:
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    made = Tokenizer(models.WordLevel({t: n for n, t in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if kind in ("t5", "bart", "marian", "mbart", "bert2bert"):
        made.post_processor = processors.TemplateProcessing(
            single="$A [SEP]", special_tokens=[("[SEP]", 3)]
        )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="[PAD]",
        unk_token="[UNK]",
        bos_token="[CLS]",
        eos_token="[SEP]",
        model_max_length=64,
    ).save_pretrained(folder)

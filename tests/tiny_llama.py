"""Random Llama models, and byte-level BPE tokenizers that are learned from a few sentences."""

from typing import Any

import torch
import transformers
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers, trainers

SENTENCES = (
    "The quick brown fox jumps over the lazy dog, and it's 1234 times as quick as we'll ever be.",
    "She said that they've been here since 2019; I'm not sure.\n\nWhat's in a name?",
    "There are   many spaces, tabs\tand\nlines. Don't count them: 1, 22, 333, 4444, 55555!",
    "Größe, naïve café, 東京 and emoji 🙂 are bytes of several kinds.",
) * 4
TEXTS = (
    *SENTENCES[:4],
    "hello world",
    " leading and trailing ",
    "",
    "   \n \n\n  x\t\ty",
    "3 33 333 3333 33333 1234567",
    "I'VE it'S don't 'tis ''''''",
    "🚀 नमस्ते ünïcödé ÀÉ…",
    "<|user|>hi<|end|> <tool> x<tool>",
)
TEMPLATE = (
    "{% for m in messages %}<|user|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|user|>assistant\n{% endif %}"
)
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def word_cut(name: str) -> Any:
    """The way to cut texts into words that llama.cpp has under this name."""
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if name == "gpt-2":
        return plain
    if name == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), plain])
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def byte_tokenizer(name: str = "gpt-2", *, template: str | None = TEMPLATE) -> Any:
    """A tokenizer of 420 tokens; "llama-bpe" begins each text with a token, the others do not."""
    from tokenizers import decoders, processors

    made = Tokenizer(models.BPE(ignore_merges=name == "llama-bpe"))
    made.pre_tokenizer = word_cut(name)
    made.decoder = decoders.ByteLevel()
    special = ["<|begin|>", "<|end|>", "<|user|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(SENTENCES, trainer)
    made.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    if name == "llama-bpe":
        made.post_processor = processors.TemplateProcessing(
            single="<|begin|> $A", special_tokens=[("<|begin|>", 0)]
        )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<|begin|>", eos_token="<|end|>", pad_token="<|end|>"
    )
    tokenizer.chat_template = template
    return tokenizer


def random_llama(size: int, *, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    """A Llama of two blocks with four heads and two of keys, for so many tokens."""
    config = transformers.LlamaConfig(
        **{
            "vocab_size": size,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
            "rms_norm_eps": 1e-5,
            "initializer_range": 0.15,
            "tie_word_embeddings": False,
            "bos_token_id": 0,
            "eos_token_id": 1,
            **settings,
        }
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config)
        for name, parameter in model.named_parameters():
            if "norm" in name:
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model.to(dtype).eval()

"""Stop texts, with a model that says what it is told to."""

from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from lora_cli.config.generation import GenerationConfig
from lora_cli.tasks.generation import generate, text_of


def test_stop_texts_may_span_tokens_and_bytes() -> None:
    """Each letter is a token of its own, and a Chinese character is three."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=257, special_tokens=["</s>"], initial_alphabet=alphabet
    )
    made.train_from_iterator([""], trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>")
    tokenizer.pad_token = "</s>"
    said = tokenizer("我想。好的。End: yes")["input_ids"]
    assert len(said) > 20

    class Parrot(transformers.GPT2LMHeadModel):  # type: ignore[misc]
        """Says `said`, whatever it is told."""

        def forward(self, input_ids: Any = None, **inputs: Any) -> Any:
            self.told = getattr(self, "told", -1) + 1
            found = super().forward(input_ids, **inputs)
            found.logits = torch.zeros_like(found.logits)
            found.logits[:, -1, said[self.told]] = 1.0
            return found

    shape = {"vocab_size": len(tokenizer), "n_embd": 8, "n_layer": 1, "n_head": 1}
    for stop, wanted in ((("好的",), "我想。"), (("nothing", "d:"), "我想。好的。En")):
        model = Parrot(transformers.GPT2Config(**shape, eos_token_id=0, bos_token_id=0)).eval()
        config = GenerationConfig(max_new_tokens=len(said), stop=stop)
        (row,) = generate(model, tokenizer, [[5, 6]], config, ids=["1"])
        assert row == said[: len(row)]
        assert text_of(tokenizer, row, config) == wanted
        assert model.told + 1 == len(row), "nothing is computed behind the stop text"

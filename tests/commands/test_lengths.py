from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import (
    BartConfig,
    BertConfig,
    CLIPConfig,
    EncoderDecoderConfig,
    GPT2Config,
    T5Config,
)

from lora_cli.commands.lengths import check_length
from lora_cli.config.commands import TrainConfig
from lora_cli.config.language import Seq2SeqConfig
from lora_cli.config.media import ImageTextContrastiveConfig
from lora_cli.config.strategies import PrefixStrategyConfig
from lora_cli.config.tasks import TextClassificationConfig
from lora_cli.errors import UserError

BERT = BertConfig(max_position_embeddings=64)
LONG = BertConfig(max_position_embeddings=128)


def problems(config: Any, task: Any, **settings: Any) -> list[Any]:
    try:
        check_length(replace(TrainConfig(task=task), **settings), SimpleNamespace(config=config))
    except UserError as error:
        return list(error.problems)
    return []


@pytest.mark.parametrize("config", [BERT, GPT2Config(n_positions=64)])
def test_rows_fit_into_the_positions(config: Any) -> None:
    assert not problems(config, TextClassificationConfig(max_length=64))
    (found,) = problems(config, TextClassificationConfig(max_length=65))
    assert found.id == "task.max-length"
    assert found.message == (
        "`task.max_length` must be at most 64, the positions that the model has, but is 65."
    )


def test_a_prefix_takes_positions() -> None:
    strategy = PrefixStrategyConfig(num_tokens=10)
    assert not problems(BERT, TextClassificationConfig(max_length=54), strategy=strategy)
    (found,) = problems(BERT, TextClassificationConfig(max_length=55), strategy=strategy)
    assert "the 64 positions of the model less the prefix" in found.message
    assert found.fix == "task.max_length=54"


def test_sources_and_targets_have_positions_of_their_own() -> None:
    task = Seq2SeqConfig(max_length=100, max_target_length=70)
    found = problems(BartConfig(max_position_embeddings=64), task)
    assert [one.key for one in found] == ["task.max_length", "task.max_target_length"]
    pair = EncoderDecoderConfig.from_encoder_decoder_configs(LONG, BERT)
    (found_one,) = problems(pair, task)
    assert found_one.key == "task.max_target_length"
    other = EncoderDecoderConfig.from_encoder_decoder_configs(BERT, LONG)
    (found_one,) = problems(other, task)
    assert found_one.key == "task.max_length"
    assert not problems(T5Config(), task), "its positions are relative"


def test_the_half_that_reads_texts_counts() -> None:
    clip = CLIPConfig(text_config={"max_position_embeddings": 20})
    assert not problems(clip, ImageTextContrastiveConfig(max_length=20))
    (found,) = problems(clip, ImageTextContrastiveConfig(max_length=21))
    assert found.key == "task.max_length"

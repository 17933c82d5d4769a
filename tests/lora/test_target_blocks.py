"""`lora.layers`, and what adapter files of PEFT say of blocks."""

import peft
import pytest
import torch
import transformers
from torch import nn
from transformers import AutoConfig, BertConfig, BertForSequenceClassification, BertModel

from lora_cli.errors import UserError
from lora_cli.lora.kinds import kind_of
from lora_cli.lora.targets import ResolvedTargets, Targets, match_targets, resolve_targets

CONFIG = BertConfig(
    vocab_size=20,
    hidden_size=8,
    num_hidden_layers=12,
    num_attention_heads=2,
    intermediate_size=8,
    num_labels=3,
)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    with torch.device("meta"):
        return BertForSequenceClassification(CONFIG)


def resolve(
    model: nn.Module, targets: Targets, *, layers: tuple[int | str, ...]
) -> ResolvedTargets:
    return resolve_targets(
        model,
        targets=targets,
        exclude=(),
        auto=("query", "value"),
        saved_modules=(),
        layers=layers,
    )


@pytest.mark.parametrize(
    ("layers", "blocks"),
    [
        ((0,), {0}),
        ((-1,), {11}),
        (("8-11",), {8, 9, 10, 11}),
        (("top-4",), {8, 9, 10, 11}),
        ((0, "2-3", -2), {0, 2, 3, 10}),
    ],
)
def test_layers(model: nn.Module, layers: tuple[int | str, ...], blocks: set[int]) -> None:
    resolved = resolve(model, "auto", layers=layers)
    expected = tuple(
        f"bert.encoder.layer.{i}.attention.self.{part}"
        for i in sorted(blocks)
        for part in ("query", "value")
    )
    assert resolved.names == expected
    assert resolved.counts == {"query": len(blocks), "value": len(blocks)}


def test_layers_leave_out_what_is_in_no_block(model: nn.Module) -> None:
    names = resolve(model, ("[wq]*e[rd]*",), layers=(0,)).names
    assert names == ("bert.encoder.layer.0.attention.self.query",)
    with pytest.raises(UserError, match="in no numbered block"):
        resolve(model, ("word_embeddings",), layers=(0,))


def test_layers_that_are_not_there_are_all_reported(model: nn.Module) -> None:
    with pytest.raises(UserError) as caught:
        resolve(model, "auto", layers=(12, 3, "10-12", "top-13", -13))
    assert [problem.key for problem in caught.value.problems] == ["lora.layers"] * 4
    assert [problem.message.split()[-4] for problem in caught.value.problems] == [
        "12",
        "10-12",
        "top-13",
        "-13",
    ]
    assert caught.value.problems[0].allowed == "0 to 11 (bert.encoder.layer)"


def test_layers_count_in_encoder_and_decoder_each() -> None:
    config = AutoConfig.for_model("t5", d_model=8, num_layers=3, num_decoder_layers=2)
    with torch.device("meta"):
        model = transformers.T5Model(config)
    names = resolve(model, ("q",), layers=(-1,)).names
    assert names == (
        "encoder.block.2.layer.0.SelfAttention.q",
        "decoder.block.1.layer.0.SelfAttention.q",
        "decoder.block.1.layer.1.EncDecAttention.q",
    )
    assert len(resolve(model, ("q",), layers=(2,)).names) == 1
    with pytest.raises(UserError) as caught:
        resolve(model, ("q",), layers=(3,))
    allowed = "0 to 2 (encoder.block) or 0 to 1 (decoder.block)"
    assert caught.value.problems[0].allowed == allowed


@pytest.mark.parametrize(
    ("targets", "layers", "pattern"),
    [
        (["query", "value"], [0, 11], None),
        (["query", "bert.encoder.layer.5.attention.self.value"], [0], None),
        (["dense"], [3], "layer"),
        (["dense"], [3], ["blocks", "layer"]),
        (["query"], [3], ["blocks"]),
        (["query", "dense"], 2, []),
    ],
)
def test_blocks_of_an_adapter_file_as_in_peft(
    model: nn.Module, targets: list[str], layers: list[int] | int, pattern: list[str] | str | None
) -> None:
    config = peft.LoraConfig(
        target_modules=targets, layers_to_transform=layers, layers_pattern=pattern
    )
    expected = tuple(
        name
        for name, module in model.named_modules()
        if kind_of(module) == "linear"
        and peft.tuners.tuners_utils.check_target_module_exists(config, name)
    )
    assert expected == match_targets(
        model,
        targets=tuple(targets),
        saved_modules=(),
        layers=[layers] if isinstance(layers, int) else layers,
        layers_pattern=(pattern,) if isinstance(pattern, str) else tuple(pattern or ()),
    )


@pytest.mark.parametrize(
    ("targets", "exclude", "layers", "key"),
    [
        (("query", "value"), ("value",), None, "lora.exclude"),
        (("query", "word_embeddings"), (), (0,), "lora.layers"),
    ],
)
def test_no_entry_of_targets_is_taken_away_whole(
    targets: tuple[str, ...], exclude: tuple[str, ...], layers: tuple[int, ...] | None, key: str
) -> None:
    config = BertConfig(
        vocab_size=9, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8
    )
    with torch.device("meta"):
        model = BertModel(config)
    with pytest.raises(UserError) as caught:
        resolve_targets(
            model,
            targets=targets,
            exclude=exclude,
            auto=None,
            saved_modules=(),
            variant="lora",
            layers=layers,
        )
    (problem,) = caught.value.problems
    assert problem.key == key
    assert targets[1] in problem.message

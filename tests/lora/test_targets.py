import time
from typing import Any

import pytest
import torch
import transformers
from tiny_sounds import build
from torch import nn
from transformers import (
    AutoConfig,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    PreTrainedConfig,
)

from lora_cli.errors import UserError
from lora_cli.lora.build import adaptable_kinds
from lora_cli.lora.kinds import is_linear, kind_of
from lora_cli.lora.targets import (
    ResolvedTargets,
    Targets,
    match_targets,
    resolve_targets,
)
from lora_cli.lora.unmatched import UnmatchedTargetsError

CONFIG = BertConfig(
    vocab_size=20,
    hidden_size=8,
    num_hidden_layers=12,
    num_attention_heads=2,
    intermediate_size=8,
    num_labels=3,
)


DECODER = "cls.predictions.decoder"


def tiny(model_type: str, **settings: object) -> PreTrainedConfig:
    return AutoConfig.for_model(model_type, **settings)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    with torch.device("meta"):
        return BertForSequenceClassification(CONFIG)


def resolve(
    model: nn.Module,
    targets: Targets,
    *,
    exclude: tuple[str, ...] = (),
    auto: tuple[str, ...] | None = ("query", "value"),
    saved: tuple[str, ...] = ("classifier",),
    variant: str = "lora",
) -> ResolvedTargets:
    return resolve_targets(
        model,
        targets=targets,
        exclude=exclude,
        auto=auto,
        saved_modules=saved,
        variant=variant,
    )


def test_auto_takes_the_family_names_in_module_order(model: nn.Module) -> None:
    resolved = resolve(model, "auto")
    assert resolved.counts == {"query": 12, "value": 12}
    # Layer 2 comes before layer 10: module order, not the order of text.
    assert resolved.names == tuple(
        f"bert.encoder.layer.{i}.attention.self.{part}"
        for i in range(12)
        for part in ("query", "value")
    )


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        ("query", 12),
        ("self.query", 12),
        ("bert.encoder.layer.3.attention.self.query", 1),
        ("1.attention.self.query", 1),  # whole parts: not layer 11
        ("attention.output.dense", 12),
        ("dense", 37),  # three of each layer and the pooler
        ("*.layer.0.*", 6),
        ("q*", 12),
        ("*self.[qk]*", 24),
    ],
)
def test_patterns(model: nn.Module, pattern: str, count: int) -> None:
    resolved = resolve(model, (pattern,))
    assert resolved.counts == {pattern: count}
    assert len(resolved.names) == count


@pytest.mark.parametrize("pattern", ["uery", "Query", "bert", "query.", "encoder.layer.0", "self"])
def test_near_misses_match_nothing(model: nn.Module, pattern: str) -> None:
    with pytest.raises(UnmatchedTargetsError):
        resolve(model, (pattern,))


def test_every_unmatched_pattern_is_reported_with_the_nearest_name(model: nn.Module) -> None:
    with pytest.raises(UnmatchedTargetsError) as caught:
        resolve(model, ("qurey", "value", "zzzz"), exclude=("dnse",))
    error = caught.value
    assert error.exit_code == 2
    assert error.patterns == ("qurey", "zzzz", "dnse")
    embeddings = ("position_embeddings", "token_type_embeddings")
    known = ("dense", "key", *embeddings[:1], "query", *embeddings[1:], "value", "word_embeddings")
    assert error.known == ("classifier", *known)
    assert [(p.id, p.key) for p in error.problems] == [
        ("lora.unmatched-target", "lora.targets"),
        ("lora.unmatched-target", "lora.targets"),
        ("lora.unmatched-target", "lora.exclude"),
    ]
    first = error.problems[0]
    assert first.message == (
        '`lora.targets` must name layers of the model, but "qurey" matches none.'
    )
    assert first.allowed == ", ".join(known)
    assert first.fix == 'did you mean "query"?'


def test_head_is_never_a_target(model: nn.Module) -> None:
    with pytest.raises(UnmatchedTargetsError, match="trained whole"):
        resolve(model, ("classifier",))
    assert resolve(model, ("classifier",), saved=()).names == ("classifier",)


def test_all_linear_leaves_out_saved_modules(model: nn.Module) -> None:
    resolved = resolve(model, "all-linear", saved=("bert.pooler", "classifier"))
    assert resolved.counts == {"all-linear": 72}
    assert not [n for n in resolved.names if n.startswith(("bert.pooler", "classifier"))]
    assert "bert.pooler.dense" in resolve(model, "all-linear").names


@pytest.mark.parametrize(
    ("auto_class", "config", "left_out"),
    [
        ("AutoModelForMaskedLM", CONFIG, {"cls.predictions.transform.dense", DECODER}),
        ("AutoModelForSequenceClassification", CONFIG, {"classifier"}),
        ("AutoModelForCausalLM", tiny("gpt2", n_embd=8, n_layer=2, n_head=2), {"lm_head"}),
        ("AutoModelForSequenceClassification", tiny("gpt2", n_embd=8, n_head=2), {"score"}),
        ("AutoModelForCausalLM", tiny("llama", hidden_size=64, num_hidden_layers=2), {"lm_head"}),
        ("AutoModelForSeq2SeqLM", tiny("t5", d_model=8, num_layers=2), {"lm_head"}),
        ("AutoModelForQuestionAnswering", tiny("t5", d_model=8, num_layers=2), {"qa_outputs"}),
        (
            "AutoModelForAudioClassification",
            tiny("whisper", d_model=8, encoder_layers=2, encoder_attention_heads=2),
            {"classifier"},
        ),
        ("AutoModelForImageClassification", tiny("vit", hidden_size=12), {"classifier"}),
        (
            "AutoModelForSequenceClassification",
            tiny("bart", d_model=16, encoder_layers=1, decoder_layers=1),
            {"classification_head.dense", "classification_head.out_proj"},
        ),
    ],
)
def test_all_linear_leaves_out_heads_and_output_embeddings(
    auto_class: str, config: PreTrainedConfig, left_out: set[str]
) -> None:
    with torch.device("meta"):
        model = getattr(transformers, auto_class).from_config(config)
    names = set(resolve(model, "all-linear", saved=()).names)
    linear = {name for name, module in model.named_modules() if is_linear(module)}
    assert linear - names == left_out


def test_all_linear_looks_into_models_inside_of_a_model() -> None:
    config = EncoderDecoderConfig.from_encoder_decoder_configs(CONFIG, CONFIG)
    with torch.device("meta"):
        names = resolve(EncoderDecoderModel(config), "all-linear", saved=()).names
    assert not [name for name in names if "decoder.cls" in name]
    assert "decoder.bert.encoder.layer.0.crossattention.self.query" in names
    assert "encoder.encoder.layer.0.attention.self.query" in names


def test_all_linear_goes_by_what_a_model_says_of_its_output() -> None:
    class Speaker(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside = nn.Linear(4, 4)
            self.voices = nn.ModuleList([nn.Linear(4, 4)])

        def get_output_embeddings(self) -> nn.Module:
            return self.voices

    assert resolve(Speaker(), "all-linear", saved=()).names == ("inside",)


def test_all_linear_takes_neither_embeddings_nor_convolutions() -> None:
    with torch.device("meta"):
        model = transformers.ViTModel(tiny("vit", hidden_size=12, num_hidden_layers=1))
    kinds = {kind_of(model.get_submodule(n)) for n in resolve(model, "all-linear", saved=()).names}
    assert kinds == {"linear"}
    assert "conv" in adaptable_kinds("lora")
    assert resolve(model, ("projection",), saved=()).names == (
        "embeddings.patch_embeddings.projection",
    )


def test_gpt2_has_linear_layers_of_another_class() -> None:
    with torch.device("meta"):
        model = transformers.GPT2Model(tiny("gpt2", n_embd=8, n_layer=2, n_head=2))
    assert resolve(model, ("c_attn",), saved=()).names == ("h.0.attn.c_attn", "h.1.attn.c_attn")
    assert resolve(model, ("wte",), saved=()).names == ("wte",)


@pytest.mark.parametrize(
    ("pattern", "variant", "why"),
    [
        ("word_embeddings", "adalora", "matches only Embedding, which lora.variant=adalora cannot"),
        ("LayerNorm", "lora", "matches only LayerNorm, which cannot be adapted"),
        ("attention", "lora", "matches only BertAttention, which cannot be adapted"),
        ("qurey", "lora", "matches none"),
    ],
)
def test_says_why_a_pattern_selects_nothing(
    model: nn.Module, pattern: str, variant: str, why: str
) -> None:
    with pytest.raises(UnmatchedTargetsError, match=why) as caught:
        resolve(model, (pattern,), variant=variant)
    assert caught.value.patterns == (pattern,)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_tied_weight_is_refused(device: str) -> None:
    with torch.device(device):
        masked = BertForMaskedLM(CONFIG)
    with pytest.raises(UserError, match="shares its weight with") as caught:
        resolve(masked, ("decoder",), saved=())
    assert caught.value.problems[0].id == "lora.tied-target"
    with pytest.raises(UserError, match=f'shares its weight with "{DECODER}"') as caught:
        resolve(masked, ("word_embeddings",), saved=())
    assert "lora.trainable_tokens" in (caught.value.problems[0].fix or "")


def test_embeddings_that_share_one_weight_are_refused() -> None:
    with torch.device("meta"):
        model = transformers.T5EncoderModel(tiny("t5", d_model=8, num_layers=2))
    with pytest.raises(UserError, match=r"encoder\.embed_tokens"):
        resolve(model, ("shared",), saved=())


def test_untied_output_embedding_is_a_target_by_name() -> None:
    with torch.device("meta"):
        untied = transformers.LlamaForCausalLM(
            tiny("llama", hidden_size=64, num_hidden_layers=1, tie_word_embeddings=False)
        )
    assert resolve(untied, ("lm_head",), saved=()).names == ("lm_head",)
    assert resolve(untied, ("embed_tokens",), saved=()).names == ("model.embed_tokens",)


def test_exclude(model: nn.Module) -> None:
    resolved = resolve(model, "auto", exclude=("*.layer.0.*", "value"))
    assert len(resolved.names) == 11
    assert "bert.encoder.layer.0.attention.self.query" not in resolved.names
    with pytest.raises(UserError, match="leaves none") as caught:
        resolve(model, "auto", exclude=("query", "value"))
    assert caught.value.problems[0].key == "lora.exclude"


def test_unknown_family(model: nn.Module) -> None:
    with pytest.raises(UserError) as caught:
        resolve(model, "auto", auto=None)
    assert caught.value.problems[0].key == "lora.targets"
    assert "query" in (caught.value.problems[0].allowed or "")


@pytest.mark.parametrize("pattern", ["", "x" * 201])
def test_pattern_lengths(model: nn.Module, pattern: str) -> None:
    with pytest.raises(UserError, match=r"1 to 200 characters") as caught:
        resolve(model, (pattern, "query"), exclude=(pattern,))
    assert [p.key for p in caught.value.problems] == ["lora.targets", "lora.exclude"]


def test_hostile_globs_are_fast(model: nn.Module) -> None:
    hostile = ("*a" * 100, "*" * 200, "[!" * 100, "(a+)+b", "*.*.*.*.*.*.*.*.*.*.*.*.*.*x")
    start = time.perf_counter()
    for pattern in hostile:
        match_targets(model, targets=(pattern,), saved_modules=())
    assert time.perf_counter() - start < 1.0


def test_attention_output_that_is_never_called_is_no_target() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16)
    assert resolve(layer, "all-linear", saved=()).names == ("linear1", "linear2")


def test_adapter_files_may_name_what_is_not_there(model: nn.Module) -> None:
    names = match_targets(
        model,
        targets=("query", "q_proj"),
        exclude=("layer.0.attention.self.query",),
        saved_modules=(),
    )
    assert len(names) == 11
    assert match_targets(model, targets=("q_proj",), saved_modules=()) == ()


@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")
def test_projections_that_wavlm_reads_without_calling_them_are_no_targets() -> None:
    model = build("wavlm")
    wanted: dict[str, Any] = {"exclude": (), "auto": None, "saved_modules": ()}
    with pytest.raises(UserError, match="WavLMAttention reads without calling them"):
        resolve_targets(model, targets=("q_proj",), **wanted)
    found = resolve_targets(model, targets="all-linear", **wanted).names
    called = set()
    for name in found:
        model.get_submodule(name).register_forward_hook(lambda *_, own=name: called.add(own))
    with torch.no_grad():
        model(input_values=torch.randn(1, 4000))
    assert set(found) == called
    assert len(found) > 4

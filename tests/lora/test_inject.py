import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForMaskedLM,
    RobertaConfig,
    RobertaForMaskedLM,
    T5Config,
    T5Model,
)

from lora_cli.errors import UserError
from lora_cli.lora.inject import freeze_base, inject_lora, saved_modules, trainable_parameters
from lora_cli.lora.linear import LoraLinear
from lora_cli.lora.settings import LoraSettings
from lora_cli.lora.state import adapter_state
from lora_cli.lora.targets import match_targets
from lora_cli.lora.unmatched import UnmatchedTargetsError

CONFIG = BertConfig(
    vocab_size=20,
    hidden_size=8,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=8,
    num_labels=3,
)
IDS = torch.tensor([[2, 5, 7, 9], [2, 6, 4, 1]])


def build() -> nn.Module:
    torch.manual_seed(0)
    return BertForSequenceClassification(CONFIG).eval()


def missing(model: nn.Module, *prefixes: str) -> list[str]:
    return [name for name, _ in model.named_parameters() if name.startswith(prefixes)]


def test_inject_changes_nothing_at_the_start_and_only_the_named_layers() -> None:
    model = build()
    before = model(IDS).logits
    names = match_targets(model, targets=("query",), saved_modules=())
    inject_lora(model, names, LoraSettings(r=2, alpha=4.0, dropout=0.1))
    assert torch.equal(model(IDS).logits, before)
    assert [n for n, m in model.named_modules() if isinstance(m, LoraLinear)] == list(names)
    with pytest.raises(UserError, match="LoraLinear"):
        inject_lora(model, names, LoraSettings(r=2, alpha=4.0, dropout=0.0))


def test_inject_inside_a_sequential_and_is_seeded() -> None:
    def start() -> nn.Module:
        model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))
        torch.manual_seed(5)
        inject_lora(model, ["0", "2"], LoraSettings(r=1, alpha=1.0, dropout=0.0))
        return model

    one, two = start(), start()
    assert isinstance(one[2], LoraLinear)
    for index in (0, 2):
        assert torch.equal(one[index].lora_A.weight, two[index].lora_A.weight)


def test_trained_is_exactly_adapters_and_saved_modules() -> None:
    model = build()
    saved = saved_modules(model, missing(model, "classifier"), ("bert.pooler",))
    names = match_targets(model, targets=("query",), saved_modules=saved)
    inject_lora(model, names, LoraSettings(r=2, alpha=4.0, dropout=0.0))
    freeze_base(model, saved)
    expected = {f"{name}.lora_{part}.weight" for name in names for part in "AB"}
    for leaf in ("weight", "bias"):
        expected |= {f"classifier.{leaf}", f"bert.pooler.dense.{leaf}"}
    assert set(trainable_parameters(model)) == expected
    assert adapter_state(model, saved).keys() == expected
    model(IDS).logits.sum().backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == expected


def test_every_layer_of_t5_is_reached() -> None:
    # T5 looks at `wo.weight` before it calls the layer.
    config = T5Config(
        vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, dropout_rate=0.0
    )
    model = T5Model(config)
    names = match_targets(model, targets="all-linear", saved_modules=())
    inject_lora(model, names, LoraSettings(r=2, alpha=4.0, dropout=0.0))
    freeze_base(model, ())
    model(input_ids=IDS, decoder_input_ids=IDS).last_hidden_state.pow(3).sum().backward()
    reached = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert {f"{name}.lora_B.weight" for name in names} <= reached
    assert any(name.endswith("wo") for name in names)


@pytest.mark.parametrize("extra", [(), ("LayerNorm",), ("bert.pooler",)])
def test_saved_modules_on_a_bfloat16_base(extra: tuple[str, ...]) -> None:
    model = build().to(torch.bfloat16)
    saved = saved_modules(model, missing(model, "classifier"), extra)
    names = match_targets(model, targets=("query",), saved_modules=saved)
    exact = model(IDS).logits
    inject_lora(model, names, LoraSettings(r=2, alpha=4.0, dropout=0.0))
    freeze_base(model, saved)
    logits = model(IDS).logits
    # The head's own output is not rounded; frozen layers still get what they expect.
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, exact.float(), rtol=0.05, atol=0.02)
    assert {p.dtype for p in trainable_parameters(model).values()} == {torch.float32}
    assert model.bert.encoder.layer[0].attention.self.key.weight.dtype == torch.bfloat16
    logits.pow(2).sum().backward()
    assert all(p.grad is not None for p in trainable_parameters(model).values())


def test_float32_base_gets_no_hooks() -> None:
    model = build()
    freeze_base(model, ("classifier",))
    assert not model.classifier._forward_pre_hooks


@pytest.mark.parametrize(
    ("new", "expected"),
    [
        (("classifier",), ("classifier",)),
        (("classifier", "bert.pooler"), ("bert.pooler", "classifier")),
        (("classifier.weight",), ("classifier",)),
        (("bert.encoder.layer.1",), ("bert.encoder.layer.1",)),  # not the list of layers
        (("bert.encoder.layer",), ("bert.encoder",)),
        ((), ()),
    ],
)
def test_head_guard(new: tuple[str, ...], expected: tuple[str, ...]) -> None:
    model = build()
    keys = [*missing(model, *new), "bert.embeddings.position_ids"] if new else []
    assert saved_modules(model, keys, ()) == expected


def test_head_guard_never_takes_the_whole_model() -> None:
    model = build()
    for prefixes in (("bert", "classifier"), ("bert",)):
        with pytest.raises(UserError) as caught:
            saved_modules(model, missing(model, *prefixes), ())
        assert caught.value.problems[0].id == "model.no-weights"


def test_new_heads_in_a_list_are_saved_one_by_one() -> None:
    # A list of modules is never called, so it could not cast its inputs.
    heads = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 3)])
    model = nn.ModuleDict({"body": nn.Linear(2, 2), "heads": heads})
    assert saved_modules(model, missing(model, "heads"), ()) == ("heads.0", "heads.1")


def test_lone_new_parameter_is_refused() -> None:
    class WithToken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token = nn.Parameter(torch.zeros(2))
            self.layer = nn.Linear(2, 2)

    with pytest.raises(UserError, match="token"):
        saved_modules(WithToken(), ["token"], ())


SIZES = {
    "vocab_size": 20,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 8,
}
MASKED = {
    "bert": (BertForMaskedLM, BertConfig(**SIZES), ("cls.predictions.transform",)),
    "roberta": (
        RobertaForMaskedLM,
        RobertaConfig(**SIZES),
        ("lm_head.dense", "lm_head.layer_norm"),
    ),
    "distilbert": (
        DistilBertForMaskedLM,
        DistilBertConfig(vocab_size=20, dim=8, n_layers=1, n_heads=2, hidden_dim=8),
        ("vocab_transform", "vocab_layer_norm"),
    ),
}


@pytest.mark.parametrize("name", MASKED)
def test_a_new_head_with_tied_scores_leaves_the_embeddings_frozen(name: str) -> None:
    """Without a stored head all of it is new, but the scores are the embeddings themselves."""
    kind, config, expected = MASKED[name]
    model = kind(config)
    embedding = model.get_input_embeddings().weight
    new = [
        key
        for key, value in model.named_parameters(remove_duplicate=False)
        if not key.startswith(f"{model.base_model_prefix}.") and value is not embedding
    ]
    saved = saved_modules(model, new, ())
    assert saved == expected
    freeze_base(model, saved)
    assert model.get_output_embeddings().weight is embedding
    assert not embedding.requires_grad
    assert not model.get_output_embeddings().bias.any()
    # With scores of its own all of the head is new.
    untied = kind(type(config)(**{**config.to_dict(), "tie_word_embeddings": False}))
    new = [key for key, _ in untied.named_parameters() if not key.startswith(f"{name}.")]
    saved = saved_modules(untied, new, ())
    freeze_base(untied, saved)
    assert untied.get_output_embeddings().weight.requires_grad
    assert not untied.get_input_embeddings().weight.requires_grad


@pytest.mark.parametrize("name", MASKED)
def test_a_new_head_in_float32_before_tied_scores_in_bfloat16(name: str) -> None:
    kind, config, saved = MASKED[name]
    model = kind(config).to(torch.bfloat16).eval()
    inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    before = model(**inputs).logits
    freeze_base(model, saved)
    after = model(**inputs).logits
    assert model.get_submodule(saved[0]).state_dict().popitem()[1].dtype == torch.float32
    torch.testing.assert_close(after, before, atol=0.05, rtol=0.05)


def test_a_random_bias_beside_tied_scores_is_refused() -> None:
    model = BertForMaskedLM(MASKED["bert"][1])
    nn.init.ones_(model.cls.predictions.bias)
    with pytest.raises(UserError, match=r"cls\.predictions\.(decoder\.)?bias"):
        saved_modules(model, ["cls.predictions.bias", "cls.predictions.decoder.bias"], ())


def test_modules_to_save_by_name_and_glob() -> None:
    model = build()
    assert saved_modules(model, [], ("pooler",)) == ("bert.pooler",)
    # An entry inside another one is part of it.
    assert saved_modules(model, [], ("pooler", "pooler.dense")) == ("bert.pooler",)
    norms = saved_modules(model, missing(model, "classifier"), ("*output.LayerNorm",))
    assert len(norms) == 5
    assert norms[-1] == "classifier"
    with pytest.raises(UnmatchedTargetsError) as caught:
        saved_modules(model, [], ("poler", "dropout", "layer"))
    error = caught.value
    assert error.patterns == ("poler", "dropout", "layer")
    assert {p.key for p in error.problems} == {"lora.modules_to_save"}
    assert error.problems[0].fix == 'did you mean "pooler"?'

"""Starts other than Kaiming: against NumPy's decompositions, and against PEFT's."""

import copy
import math
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2Model

from lora_cli.errors import UserError
from lora_cli.lora.initial import olora_factors, pissa_factors, start_adapters
from lora_cli.lora.inject import freeze_base, inject_lora, trainable_parameters
from lora_cli.lora.linear import LoraLinear
from lora_cli.lora.merge import merge_lora
from lora_cli.lora.settings import LoraSettings
from lora_cli.lora.state import adapter_state
from lora_cli.lora.tokens import put_tokens

# peft 0.21 asks transformers for a property that transformers 5 has renamed, and tells of layers
# of GPT-2 that it treats rightly, and of adapters that it could not make portable.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning"),
    pytest.mark.filterwarnings("ignore:Using Rank-Stabilized LoRA with rank_pattern:UserWarning"),
]

PATTERNS: Any = {"rank_pattern": {"query": 3}, "alpha_pattern": {"intermediate.dense": 5.0}}


def tiny_bert(dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(5)
    config = BertConfig(
        vocab_size=40,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=40,
        max_position_embeddings=32,
        initializer_range=0.2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=3,
    )
    return BertForSequenceClassification(config).to(dtype).eval()


def layers_of(model: nn.Module, *lasts: str) -> list[str]:
    return [name for name, _ in model.named_modules() if name.rpartition(".")[2] in lasts]


def adapted(base: Any, settings: LoraSettings, *targets: str, seed: int = 0) -> Any:
    model = copy.deepcopy(base)
    torch.manual_seed(seed)
    inject_lora(model, layers_of(model, *targets), settings)
    start_adapters(model, settings)
    freeze_base(model, ())
    return model


def peft_model(base: Any, init: Any, *targets: str, **config: Any) -> Any:
    return get_peft_model(
        copy.deepcopy(base), PeftConfig(init_lora_weights=init, target_modules=[*targets], **config)
    )


def peft_factors(model: Any) -> dict[str, torch.Tensor]:
    """PEFT's trained tensors by our names."""
    return {
        name.removeprefix("base_model.model.")
        .replace(".default", "")
        .replace("lora_magnitude_vector.weight", "lora_magnitude_vector"): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def inputs() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {"input_ids": torch.randint(0, 40, (4, 9)), "labels": torch.tensor([0, 1, 2, 1])}


def take_start(ours: Any, names: list[str], found: Any, *, plain: bool) -> None:
    """Give our layers the random start of PEFT's, once both have found as much of the weight."""
    for name in names:
        layer: Any = ours.get_submodule(name)
        A, B = (found[f"{name}.lora_{letter}.weight"].detach() for letter in "AB")
        if plain:
            layer.lora_A.weight.data.copy_(A)
            continue
        weight, scale = layer.base_layer.weight, layer.scale
        mine = weight - scale * layer.lora_B.weight @ layer.lora_A.weight
        his = weight - scale * B @ A
        assert mine.norm().item() == pytest.approx(his.norm().item(), rel=0.02)
        assert mine.norm() < 0.97 * weight.norm()
        layer.start_from(A, B)


@pytest.mark.parametrize(("variant", "rslora"), [("lora", False), ("lora", True), ("dora", False)])
@pytest.mark.parametrize(
    ("init", "niter"), [("pissa", None), ("pissa", 4), ("olora", None), ("kaiming", None)]
)
def test_start_and_steps_are_those_of_peft(
    init: str, niter: int | None, variant: str, rslora: bool
) -> None:
    base, batch = tiny_bert(), inputs()
    targets = ("query", "dense")
    settings = LoraSettings(
        r=4,
        alpha=6.0,
        variant=variant,
        rslora=rslora,
        init=init,
        pissa_niter=niter,
        **PATTERNS,
    )
    ours = adapted(base, settings, *targets)
    theirs = peft_model(
        base,
        True if init == "kaiming" else init if niter is None else f"pissa_niter_{niter}",
        *targets,
        r=4,
        lora_alpha=6.0,
        use_rslora=rslora,
        use_dora=variant == "dora",
        **PATTERNS,
    )
    pairs, found = trainable_parameters(ours), peft_factors(theirs)
    assert set(pairs) == set(found)
    assert len(pairs) == (3 if variant == "dora" else 2) * 9
    if init != "kaiming" and niter is None:
        for name, parameter in pairs.items():
            torch.testing.assert_close(parameter, found[name], atol=2e-6, rtol=1e-5)
    else:
        take_start(ours, layers_of(ours, *targets), found, plain=init == "kaiming")
    with torch.no_grad():
        at_start = base(input_ids=batch["input_ids"]).logits
        torch.testing.assert_close(ours(**batch).logits, at_start, atol=1e-5, rtol=0)
        torch.testing.assert_close(theirs(**batch).logits, at_start, atol=1e-5, rtol=0)

    models = {"ours": (ours, pairs), "theirs": (theirs, found)}
    optimizers = {n: torch.optim.SGD(list(p.values()), lr=0.05) for n, (_, p) in models.items()}
    for _ in range(4):
        for name, (model, _) in models.items():
            optimizers[name].zero_grad()
            model(**batch).loss.backward()
        for name, parameter in pairs.items():
            torch.testing.assert_close(parameter.grad, found[name].grad, atol=1e-5, rtol=1e-4)
        for optimizer in optimizers.values():
            optimizer.step()
    check_merged(base, ours, theirs, batch, at_start, targets)


@torch.no_grad()
def check_merged(
    base: Any, ours: Any, theirs: Any, batch: Any, at_start: Any, targets: Any
) -> None:
    """Compare what both have learned, live and merged."""
    after = ours(**batch).logits
    assert (after - at_start).abs().max() > 0.05
    torch.testing.assert_close(after, theirs(**batch).logits, atol=1e-5, rtol=0)
    merge_lora(ours)
    merged = theirs.merge_and_unload()
    torch.testing.assert_close(ours(**batch).logits, after, atol=1e-5, rtol=0)
    for name in layers_of(base, *targets):
        torch.testing.assert_close(
            ours.get_parameter(f"{name}.weight"),
            merged.get_parameter(f"{name}.weight"),
            atol=1e-5,
            rtol=0,
        )


def test_the_base_weights_stay_untouched() -> None:
    base = tiny_bert()
    before = {name: value.clone() for name, value in base.state_dict().items()}
    model = adapted(base, LoraSettings(r=4, alpha=8.0, init="pissa"), "query")
    after = model.state_dict()
    for name, value in before.items():
        inside = name.replace(".query.", ".query.base_layer.")
        assert torch.equal(after[inside], value), name


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_layers_of_gpt2_start_as_the_same_linear_layers_do(init: str) -> None:
    """PEFT's OLoRA decomposes the stored weight of Conv1D, which is the transpose, and is wrong."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=40,
        n_embd=16,
        n_layer=1,
        n_head=2,
        n_positions=16,
        bos_token_id=1,
        eos_token_id=2,
    )
    base = GPT2Model(config).eval()
    ids = torch.randint(0, 40, (2, 7))
    settings = LoraSettings(r=3, alpha=6.0, init=init)
    model = adapted(base, settings, "c_attn", "c_proj")
    for name in layers_of(base, "c_attn", "c_proj"):
        stored = base.get_parameter(f"{name}.weight")
        plain = nn.Linear(*stored.shape)
        plain.weight.data.copy_(stored.T)
        twin = nn.Sequential(LoraLinear(plain, r=3, alpha=6.0))
        start_adapters(twin, settings)
        for letter in "AB":
            assert torch.equal(
                model.get_parameter(f"{name}.lora_{letter}.weight"),
                twin.get_parameter(f"0.lora_{letter}.weight"),
            )
    at_start = base(ids).last_hidden_state
    torch.testing.assert_close(model(ids).last_hidden_state, at_start, atol=1e-5, rtol=0)
    if init == "pissa":
        theirs = peft_factors(peft_model(base, "pissa", "c_attn", "c_proj", r=3, lora_alpha=6.0))
        for name, parameter in trainable_parameters(model).items():
            torch.testing.assert_close(parameter, theirs[name], atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_base_of_low_precision_gives_exactly_its_own_outputs_at_the_start(init: str) -> None:
    base, batch = tiny_bert(torch.bfloat16), inputs()
    model = adapted(base, LoraSettings(r=4, alpha=8.0, init=init), "query", "dense")
    layer = model.bert.encoder.layer[0].attention.self.query
    assert layer.lora_A.weight.dtype == torch.float32
    wide = layer.base_layer.weight.float()
    expected = (
        pissa_factors(wide, r=4, scale=2.0, niter=None)
        if init == "pissa"
        else olora_factors(wide, r=4)
    )
    assert torch.equal(layer.lora_A.weight, expected[0])
    ids = batch["input_ids"]
    assert torch.equal(model(input_ids=ids).logits, base(input_ids=ids).logits)


def test_gaussian_draws_a_with_spread_one_over_r() -> None:
    base = nn.Sequential(nn.Linear(4000, 50), nn.Linear(50, 4000))
    settings = LoraSettings(r=8, alpha=8.0, init="gaussian", rank_pattern={"1": 20})
    inject_lora(base, ["0", "1"], settings)
    start_adapters(base, settings)
    for name, r in (("0", 8), ("1", 20)):
        A = base.get_parameter(f"{name}.lora_A.weight")
        assert A.std().item() == pytest.approx(1 / r, rel=0.06)
        assert abs(A.mean().item()) < 0.02 / math.sqrt(r)
        # Kurtosis tells a normal from a uniform distribution: 3 against 1.8.
        assert (A / A.std()).pow(4).mean().item() == pytest.approx(3, abs=0.5)
        assert not base.get_parameter(f"{name}.lora_B.weight").any()
        assert not hasattr(base.get_submodule(name), "start_a")
    theirs = peft_model(
        nn.Sequential(nn.Linear(4000, 50)), "gaussian", "0", r=8, lora_alpha=8.0
    ).get_parameter("base_model.model.0.lora_A.default.weight")
    assert theirs.std().item() == pytest.approx(
        base.get_parameter("0.lora_A.weight").std().item(), rel=0.05
    )


def test_the_same_seed_gives_the_same_start() -> None:
    for init, niter in (("gaussian", None), ("pissa", 2)):
        settings = LoraSettings(r=4, alpha=8.0, init=init, pissa_niter=niter)
        states = [
            adapter_state(adapted(tiny_bert(), settings, "query", seed=seed), ())
            for seed in (3, 3, 4)
        ]
        name = "bert.encoder.layer.1.attention.self.query.lora_A.weight"
        assert torch.equal(states[0][name], states[1][name])
        assert not torch.equal(states[0][name], states[2][name])


class Mixed(nn.Module):
    """Layers of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 300)
        self.conv = nn.Conv1d(300, 40, 3)
        self.attention = nn.MultiheadAttention(300, 2)
        self.linear = nn.Linear(300, 40)


def test_gaussian_suits_layers_of_every_kind() -> None:
    torch.manual_seed(0)
    model = Mixed()
    settings = LoraSettings(r=10, alpha=8.0, init="gaussian")
    inject_lora(model, ["table", "conv", "attention", "linear"], settings)
    start_adapters(model, settings)
    state = adapter_state(model, ())
    drawn = {name: value for name, value in state.items() if name.endswith("lora_A.weight")}
    assert {name.removesuffix(".lora_A.weight") for name in drawn} == {
        "conv",
        "attention",
        "attention.base_layer.out_proj",
        "linear",
    }
    for value in drawn.values():
        assert value.std().item() == pytest.approx(0.1, rel=0.05)
    # As PEFT: the factors of an embedding start the other way round.
    assert not state["table.lora_embedding_A"].any()
    assert state["table.lora_embedding_B"].std().item() == pytest.approx(1, rel=0.05)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_layers_without_one_matrix_are_refused_together(init: str) -> None:
    model = Mixed()
    settings = LoraSettings(r=4, alpha=8.0, init=init)
    inject_lora(model, ["table", "conv", "attention", "linear"], settings)
    before = adapter_state(model, ())
    with pytest.raises(UserError) as caught:
        start_adapters(model, settings)
    (problem,) = caught.value.problems
    assert (problem.id, problem.key) == ("lora.init-kind", "lora.init")
    assert '"table" (Embedding), "conv" (Conv1d), "attention" (' in problem.message
    assert '"linear"' not in problem.message
    assert "lora.exclude=[attention,conv,table]" in str(problem.fix)
    after = adapter_state(model, ())
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_trained_tokens_do_not_hinder_a_start() -> None:
    model = Mixed()
    settings = LoraSettings(r=4, alpha=8.0, init="pissa")
    inject_lora(model, ["linear"], settings)
    put_tokens(model, {"table": (3, 7)})
    start_adapters(model, settings)
    assert model.linear.start_A is not None


def test_ranks_that_the_weight_does_not_have_are_refused_together() -> None:
    base = tiny_bert()
    settings = LoraSettings(r=25, alpha=8.0, init="olora", rank_pattern={"*.layer.1.*": 24})
    with pytest.raises(UserError) as caught:
        adapted(base, settings, "query")
    (problem,) = caught.value.problems
    assert problem.key == "lora.init"
    assert '"bert.encoder.layer.0.attention.self.query" (25 against 24)' in problem.message
    assert "layer.1" not in problem.message
    assert "olora" in problem.message
    fitting = LoraSettings(r=24, alpha=8.0, init="olora", rank_pattern={"nothing": 99})
    assert adapted(base, fitting, "query").bert.encoder.layer[0].attention.self.query.scale > 0

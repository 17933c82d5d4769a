"""Adapters on the fused weights of mixtures of experts: which are found, and PEFT as the judge."""

import copy
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from lora_cli.errors import UserError
from lora_cli.lora.experts import inject_experts, match_parameters, resolve_parameters
from lora_cli.lora.inject import freeze_base, inject_lora
from lora_cli.lora.merge import merge_lora
from lora_cli.lora.settings import LoraSettings
from lora_cli.lora.state import adapter_state, load_adapter_state
from lora_cli.lora.unmatched import UnmatchedTargetsError

# peft 0.21 asks for what transformers 5 has renamed, and looks for patterns among layers only.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning"),
]

SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "num_local_experts": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 40,
}
# GPT-OSS alone says that its matrices are transposed; Llama 4 has such without saying so.
FAMILIES = ("mixtral", "qwen3_moe", "gpt_oss", "llama4_text")
EXPERTS = ("experts.gate_up_proj", "experts.down_proj")
PREFIX = "base_model.model."


def tiny(family: str = "mixtral") -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SIZES)
    return AutoModelForCausalLM.from_config(config).float()


def adapted(model: Any, targets: tuple[str, ...], settings: LoraSettings) -> Any:
    """A model with adapters on experts, none of whose tensors is zero."""
    names = resolve_parameters(model, targets, saved_modules=())
    inject_experts(model, names, settings)
    freeze_base(model, ())
    generator = torch.Generator().manual_seed(3)
    state = {
        name: torch.randn(value.shape, generator=generator) * 0.3
        for name, value in adapter_state(model, ()).items()
    }
    load_adapter_state(model, state, ())
    return model


def peft_twin(model: Any, targets: tuple[str, ...], **options: Any) -> Any:
    config = LoraConfig(
        lora_alpha=6, target_modules=[], target_parameters=list(targets), **{"r": 2, **options}
    )
    return get_peft_model(copy.deepcopy(model), config)


def run(model: Any) -> Any:
    ids = torch.tensor([[3, 9, 17, 5, 30], [8, 8, 11, 39, 4]])
    return model(input_ids=ids, labels=ids, use_cache=False)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("targets", [EXPERTS, EXPERTS[::-1], EXPERTS[1:]])
@pytest.mark.parametrize("family", FAMILIES)
def test_equal_to_peft(family: str, targets: tuple[str, ...], rslora: bool) -> None:
    model = tiny(family)
    twin = peft_twin(model, targets, use_rslora=rslora).train()
    adapted(model, targets, LoraSettings(r=2, alpha=6.0, rslora=rslora)).train()
    state = adapter_state(model, ())
    theirs = peft.get_peft_model_state_dict(twin)
    assert {n.removeprefix(PREFIX): (v.shape, v.dtype) for n, v in theirs.items()} == {
        name: (value.shape, value.dtype) for name, value in state.items()
    }
    named = {PREFIX + name: value for name, value in state.items()}
    assert not peft.set_peft_model_state_dict(twin, named).unexpected_keys

    found, expected = run(model), run(twin)
    assert (found.logits - expected.logits).abs().max() <= 1e-5
    found.loss.backward()
    expected.loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert grads.keys() == state.keys()
    for name, parameter in twin.named_parameters():
        if parameter.requires_grad:
            ours = grads[name.removeprefix(PREFIX).replace(".default", "")]
            assert ours is not None
            assert ours.abs().max() > 0
            assert (ours - parameter.grad).abs().max() <= 1e-5

    merge_lora(model)
    merged = twin.merge_and_unload().state_dict()
    assert model.state_dict().keys() == merged.keys()
    for name, value in model.state_dict().items():
        assert (value - merged[name]).abs().max() <= 1e-6
    assert (run(model).logits - found.logits).abs().max() <= 1e-5


def test_ranks_by_pattern_are_those_of_peft() -> None:
    model = tiny()
    ranks = {"model.layers.1.mlp.experts.down_proj": 3}
    alphas = {"experts.gate_up_proj": 9.0}
    twin = peft_twin(model, EXPERTS, rank_pattern=ranks, alpha_pattern=alphas)
    settings = LoraSettings(r=2, alpha=6.0, rank_pattern=ranks, alpha_pattern=alphas)
    adapted(model, EXPERTS, settings)
    state = {PREFIX + name: value for name, value in adapter_state(model, ()).items()}
    assert {n: v.shape for n, v in peft.get_peft_model_state_dict(twin).items()} == {
        name: value.shape for name, value in state.items()
    }
    peft.set_peft_model_state_dict(twin, state)
    assert (run(model).logits - run(twin).logits).abs().max() <= 1e-5


def test_lora_fa_trains_b_only() -> None:
    model = adapted(tiny(), EXPERTS, LoraSettings(r=2, alpha=6.0, variant="lora_fa"))
    trained = [name for name, value in model.named_parameters() if value.requires_grad]
    assert len(trained) == 4
    assert all(name.endswith("lora_B.weight") for name in trained)
    assert len(adapter_state(model, ())) == 8


def test_with_adapters_on_layers_beside_it() -> None:
    model = tiny()
    settings = LoraSettings(r=2, alpha=6.0)
    names = [f"model.layers.{index}.self_attn.q_proj" for index in range(2)]
    parameters = resolve_parameters(model, EXPERTS, saved_modules=(), adapted=names)
    before = run(model).logits
    inject_lora(model, names, settings)
    inject_experts(model, parameters, settings)
    freeze_base(model, ())
    assert torch.equal(run(model).logits, before)
    assert len(adapter_state(model, ())) == 2 * 2 + 2 * 4
    merge_lora(model)
    assert torch.equal(run(model).logits, before)


def saved_bytes(model: Any) -> int:
    """Bytes of memory that one forward pass keeps for backward."""
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run(model)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_saves_no_more_than_peft(family: str) -> None:
    model = tiny(family)
    twin = peft_twin(model, EXPERTS).train()
    adapted(model, EXPERTS, LoraSettings(r=2, alpha=6.0)).train()
    ours = saved_bytes(model)
    assert 0 < ours <= saved_bytes(twin)


def test_bfloat16_base_is_near_peft() -> None:
    model = tiny().bfloat16()
    twin = peft_twin(model, EXPERTS)
    adapted(model, EXPERTS, LoraSettings(r=2, alpha=6.0))
    state = {PREFIX + name: value for name, value in adapter_state(model, ()).items()}
    assert {value.dtype for value in state.values()} == {torch.float32}
    peft.set_peft_model_state_dict(twin, state)
    found, expected = run(model).logits, run(twin).logits
    assert found.dtype == expected.dtype
    assert (found - expected).abs().max() <= 0.02


def test_names_in_the_order_of_the_model() -> None:
    model = tiny()
    found = resolve_parameters(model, EXPERTS[::-1], saved_modules=())
    assert found == tuple(
        f"model.layers.{index}.mlp.{name}" for index in range(2) for name in EXPERTS
    )
    assert match_parameters(model, EXPERTS[::-1], saved_modules=()) == found
    last = resolve_parameters(model, EXPERTS[1:], saved_modules=(), layers=(-1,))
    assert last == ("model.layers.1.mlp.experts.down_proj",)
    globbed = resolve_parameters(model, ("*.layers.0.*experts.*",), saved_modules=())
    assert globbed == found[:2]


def test_router_is_a_matrix_of_its_own() -> None:
    model = tiny()
    before = run(model).logits
    adapted(model, ("gate.weight",), LoraSettings(r=2, alpha=6.0))
    assert not torch.allclose(run(model).logits, before)
    merge_lora(model)
    assert "lora" not in str(model.state_dict().keys())


def test_unmatched_entries_are_reported_together_with_near_names() -> None:
    with pytest.raises(UnmatchedTargetsError) as info:
        resolve_parameters(
            tiny(),
            ("experts.dwon_proj", "experts.down_proj", "input_layernorm.weight", "q_proj"),
            saved_modules=(),
        )
    problems = info.value.problems
    assert [problem.key for problem in problems] == ["lora.target_parameters"] * 3
    assert {problem.id for problem in problems} == {"lora.unmatched-target"}
    assert problems[0].fix == 'did you mean "experts.down_proj"?'
    assert problems[0].allowed == "experts.down_proj, experts.gate_up_proj, gate.weight"
    assert '"input_layernorm.weight" has 1 dimension, not two or three' in problems[1].message


def test_modules_trained_whole_are_left_out() -> None:
    model = tiny()
    saved = ("model.layers.0.mlp",)
    found = resolve_parameters(model, EXPERTS, saved_modules=saved)
    assert all(name.startswith("model.layers.1.") for name in found)
    with pytest.raises(UnmatchedTargetsError, match="matches only weights of modules that are"):
        resolve_parameters(model, EXPERTS, saved_modules=("model.layers",))


def test_layer_that_targets_names_is_refused() -> None:
    with pytest.raises(UserError, match=r"belongs to a layer that `lora.targets` names") as info:
        resolve_parameters(
            tiny(),
            ("0.self_attn.q_proj.weight",),
            saved_modules=(),
            adapted=("model.layers.0.self_attn.q_proj",),
        )
    assert "lora.exclude=[model.layers.0.self_attn.q_proj]" in str(info.value.problems[0].fix)


def test_shared_weight_is_refused() -> None:
    model = tiny()
    model.lm_head.weight = model.model.embed_tokens.weight
    with pytest.raises(UserError, match=r'"model.embed_tokens.weight" is shared with another'):
        resolve_parameters(model, ("embed_tokens.weight",), saved_modules=())


@pytest.mark.parametrize("pattern", ["", "x" * 201])
def test_what_is_no_pattern(pattern: str) -> None:
    with pytest.raises(UserError, match="names of 1 to 200 characters"):
        resolve_parameters(tiny(), (pattern,), saved_modules=())


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"dropout": 0.1}, "lora.dropout"),
        ({"variant": "dora"}, "lora.variant"),
        ({"lora_bias": True}, "lora.lora_bias"),
    ],
)
def test_settings_that_need_the_inputs_are_refused(changes: dict[str, Any], key: str) -> None:
    model = tiny()
    names = resolve_parameters(model, EXPERTS, saved_modules=())
    with pytest.raises(UserError) as info:
        inject_experts(model, names, LoraSettings(r=2, alpha=6.0, **changes))
    assert [problem.key for problem in info.value.problems] == [key]
    assert type(model.model.layers[0].mlp.experts).__name__ == "MixtralExperts"
    inject_experts(model, (), LoraSettings(r=2, alpha=6.0, **changes))


def test_checkpointing_of_activations_gives_the_same_gradients() -> None:
    grads = []
    for again in (False, True):
        model = adapted(tiny(), EXPERTS, LoraSettings(r=2, alpha=6.0)).train()
        if again:
            model.activation_checkpointing_enable()
        run(model).loss.backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    for plain, recomputed in zip(*grads, strict=True):
        assert plain is not None
        torch.testing.assert_close(plain, recomputed)


def test_module_is_itself_again_after_a_pass() -> None:
    model = adapted(tiny(), EXPERTS, LoraSettings(r=2, alpha=6.0))
    experts = model.model.layers[0].mlp.experts
    plain = experts.base_layer.base_layer
    before = plain.down_proj
    run(model)
    assert plain.down_proj is before
    assert isinstance(plain.down_proj, nn.Parameter)

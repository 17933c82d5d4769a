"""What adapters are combined from: told apart by name, scaled as the layer does, heads averaged."""

import pytest
import torch

from lora_cli.errors import UserError
from lora_cli.lora.factors import combine_saved, factor_state, few, read_factors
from lora_cli.lora.settings import LoraSettings

PLAIN = {
    "bert.layer.0.query.lora_A.weight": torch.ones(4, 6),
    "bert.layer.0.query.lora_B.weight": torch.ones(5, 4),
}
SETTINGS = LoraSettings(r=4, alpha=8.0)


def test_factors_and_saved_modules_are_told_apart() -> None:
    state = {
        **PLAIN,
        "emb.lora_embedding_A": torch.ones(2, 9),
        "emb.lora_embedding_B": torch.ones(6, 2),
        "conv.lora_A.weight": torch.ones(4, 3, 2, 2, dtype=torch.bfloat16),
        "conv.lora_B.weight": torch.ones(8, 2, 1, 1, dtype=torch.bfloat16),
        "classifier.weight": torch.ones(2, 6),
        "classifier.bias": torch.ones(2),
    }
    settings = LoraSettings(r=4, alpha=8.0, alpha_pattern={"conv": 2.0})
    factors, saved = read_factors(state, ["classifier"], settings, where="x")
    assert sorted(saved) == ["classifier.bias", "classifier.weight"]
    assert {name: (f.r, f.groups, f.scale) for name, f in factors.items()} == {
        "bert.layer.0.query": (4, 1, 2.0),
        "emb": (2, 1, 4.0),
        "conv": (4, 2, 0.5),
    }
    assert [name for name, f in factors.items() if f.is_embedding] == ["emb"]
    assert factors["conv"].A.dtype == torch.float32
    back = factor_state(factors)
    assert {**back, **saved}.keys() == state.keys()
    for name, tensor in back.items():
        assert torch.equal(tensor, state[name].float())


def test_the_projections_of_an_attention_share_their_strength() -> None:
    names = ("x.attn", "x.attn.base_layer.out_proj")
    state = {
        f"{name}.{leaf}": torch.ones(2, 2)
        for name in names
        for leaf in ("lora_A.weight", "lora_B.weight")
    }
    settings = LoraSettings(r=2, alpha=8.0, alpha_pattern={"attn": 3.0, "out_proj": 5.0})
    factors, _ = read_factors(state, [], settings, where="x")
    assert {name: f.scale for name, f in factors.items()} == dict.fromkeys(names, 1.5)


def test_rank_stabilised_scale() -> None:
    settings = LoraSettings(r=4, alpha=8.0, rslora=True)
    factors, _ = read_factors(PLAIN, [], settings, where="x")
    assert factors["bert.layer.0.query"].scale == 4.0


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("bert.layer.0.query.lora_B.bias", "biases of B"),
        ("bert.layer.0.query.lora_magnitude_vector", "DoRA magnitudes"),
        ("bert.layer.0.key.lora_E", "AdaLoRA factors"),
        ("bert.layer.0.key.lora_A", "AdaLoRA factors"),
        ("base_model.vera_A", "VeRA vectors"),
        ("vera_B", "VeRA vectors"),
        ("prompt_embeddings", "a trained prefix"),
        ("bert.layer.0.key.vera_lambda_b", "VeRA vectors"),
        ("emb.token_adapter.trainable_tokens_delta", "trained tokens"),
        ("bert.layer.0.query.base_layer.bias", "trained biases"),
        ("bert.layer.0.norm.bias", "trained biases"),
        ("bert.layer.0.down.weight", r"a tensor of another kind \(bert.layer.0.down.weight\)"),
        ("bert.layer.0.key.lora_A.weight", "a tensor of another kind"),
        ("bert.layer.0.key.lora_B.weight", "a tensor of another kind"),
        ("classifiers.weight", "a tensor of another kind"),
    ],
)
def test_everything_else_is_refused_by_name(name: str, what: str) -> None:
    with pytest.raises(UserError, match=f"but one has {what}") as caught:
        read_factors({**PLAIN, name: torch.ones(2)}, ["classifier"], SETTINGS, where="runs/a")
    (problem,) = caught.value.problems
    assert (problem.id, problem.where) == ("merge.cannot-combine", "runs/a")


def test_a_head_alone_is_no_adapter() -> None:
    with pytest.raises(UserError, match="but one has no LoRA factors"):
        read_factors({"head.weight": torch.ones(2)}, ["head"], SETTINGS, where="x")


def test_heads_are_averaged() -> None:
    first = {"w": torch.tensor([1.0, 2.0]), "steps": torch.tensor(3)}
    second = {"w": torch.tensor([5.0, -2.0]), "steps": torch.tensor(3)}
    found = combine_saved([first, second], [3.0, 1.0])
    assert found["w"].tolist() == [2.0, 1.0]
    assert found["w"].dtype == torch.float32
    assert int(found["steps"]) == 3
    found["w"].zero_()
    found["steps"].zero_()
    assert (float(first["w"][0]), int(first["steps"])) == (1.0, 3)
    alone = combine_saved([first], [0.25])
    assert torch.equal(alone["w"], first["w"])
    assert combine_saved([{}, {}], [1.0, -1.0]) == {}


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({}, r"are not in every adapter: steps, w\."),
        ({"w": torch.ones(3), "steps": torch.tensor(3)}, r"differ in shape or count: w\."),
        ({"w": torch.ones(2), "steps": torch.tensor(4)}, r"differ in shape or count: steps\."),
        (
            {"w": torch.ones(2), "steps": torch.tensor(3), "more": torch.ones(1)},
            r"are not in every adapter: more\.",
        ),
    ],
)
@pytest.mark.parametrize("swapped", [False, True])
def test_heads_that_do_not_go_together(
    second: dict[str, torch.Tensor], message: str, swapped: bool
) -> None:
    pair = [{"w": torch.ones(2), "steps": torch.tensor(3)}, second]
    with pytest.raises(UserError, match=message):
        combine_saved(pair[::-1] if swapped else pair, [1.0, 1.0])


@pytest.mark.parametrize("weights", [(1.0, -1.0), (1.0, -2.0)])
def test_heads_need_weights_that_make_a_mean(weights: tuple[float, float]) -> None:
    pair = [{"w": torch.ones(2)}, {"w": torch.ones(2)}]
    with pytest.raises(UserError, match=f"but sum to {sum(weights):g}"):
        combine_saved(pair, weights)


def test_few_names() -> None:
    assert few(list("abc")) == "a, b, c"
    assert few(list("abcdefg")) == "a, b, c, d, e and 2 more"

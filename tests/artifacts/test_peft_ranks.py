import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_cli.artifacts.peft_ranks import narrow, widen


def layer(name: str, E: list[float]) -> dict[str, torch.Tensor]:
    torch.manual_seed(len(name))
    r = len(E)
    return {
        f"{name}.lora_A": torch.randn(r, 3),
        f"{name}.lora_B": torch.randn(2, r),
        f"{name}.lora_E": torch.tensor(E).reshape(r, 1),
    }


def update(state: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    A, B, E = (state[f"{name}.lora_{leaf}"] for leaf in "ABE")
    return B @ (A * E)


def test_only_what_is_alive_is_kept() -> None:
    state = {**layer("a", [0.0, 2.0, 0.0]), **layer("bb", [1.0, 0.0, 3.0]), "head": torch.ones(2)}
    narrowed, masks = narrow(state)
    assert masks == {"a.lora_E": [False, True, False], "bb.lora_E": [True, False, True]}
    assert narrowed["a.lora_A"].shape == (1, 3)
    assert narrowed["bb.lora_B"].shape == (2, 2)
    assert torch.equal(narrowed["bb.lora_B"], state["bb.lora_B"][:, [0, 2]])
    assert torch.equal(narrowed["head"], state["head"])
    assert all(tensor.is_contiguous() for tensor in narrowed.values())


def test_nothing_is_left_out_where_all_or_none_is_alive() -> None:
    for values in ([1.0, 2.0], [0.0, 0.0]):
        state = {**layer("a", values), **layer("bb", values)}
        narrowed, masks = narrow(state)
        assert masks is None
        assert all(narrowed[name] is state[name] for name in state)


@given(
    st.lists(
        st.lists(st.sampled_from([0.0, 1.5, -2.0]), min_size=1, max_size=5), min_size=1, max_size=3
    )
)
def test_there_and_back(values: list[list[float]]) -> None:
    state: dict[str, torch.Tensor] = {}
    for number, E in enumerate(values):
        state |= layer(f"block.{number}", E)
    narrowed, masks = narrow(state)
    back = widen(narrowed, masks)
    assert {name: t.shape for name, t in back.items()} == {n: t.shape for n, t in state.items()}
    for number in range(len(values)):
        name = f"block.{number}"
        assert torch.equal(back[f"{name}.lora_E"], state[f"{name}.lora_E"])
        torch.testing.assert_close(update(back, name), update(state, name))
    # What was read is written again in the same way.
    again, same = narrow(back)
    assert same == masks
    assert all(torch.equal(again[name], narrowed[name]) for name in narrowed)


def test_masks_by_the_names_of_older_files() -> None:
    narrowed, _ = narrow({**layer("a", [0.0, 2.0]), **layer("bb", [1.0, 1.0])})
    back = widen(narrowed, {"a.lora_E.default": [False, True]})
    assert back["a.lora_E"].flatten().tolist() == [0.0, 2.0]


def test_what_does_not_fit_its_mask_is_left_for_the_reader_to_refuse() -> None:
    state = layer("a", [1.0, 2.0])
    for masks in ({"a.lora_E": [True, False, False]}, {"other.lora_E": [True]}):
        assert all(torch.equal(t, state[name]) for name, t in widen(state, masks).items())

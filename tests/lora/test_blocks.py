import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_cli.lora.blocks import (
    Block,
    block_of,
    check_blocks,
    describe_blocks,
    in_pattern,
    select_blocks,
    stack_depths,
)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("bert.encoder.layer.3.attention.self.query", Block("bert.encoder.layer", 3)),
        ("h.0.attn.c_attn", Block("h", 0)),
        ("model.layers.1.mlp.experts.7.w1", Block("model.layers", 1)),
        ("swin.encoder.layers.2.blocks.5.mlp", Block("swin.encoder.layers", 2)),
        ("layers.10", None),  # the block itself
        ("0.weight", None),
        ("bert.pooler.dense", None),
        ("a.b2.c", None),
        ("a.\u00b2.c", None),  # a digit, but no number
    ],
)
def test_block_is_the_first_number_in_a_path(name: str, expected: Block | None) -> None:
    assert block_of(name) == expected


def test_depths_count_each_list() -> None:
    names = ["encoder.0.q", "encoder.11.q", "decoder.1.q", "embeddings"]
    assert stack_depths(names) == {"encoder": 12, "decoder": 2}


@given(st.integers(1, 40), st.data())
def test_entries_mean_what_python_slices_mean(depth: int, data: st.DataObject) -> None:
    everything = list(range(depth))
    index = data.draw(st.integers(-depth, depth - 1))
    assert select_blocks([index], depth) == {everything[index]}
    first = data.draw(st.integers(0, depth - 1))
    last = data.draw(st.integers(first, depth - 1))
    assert select_blocks([f"{first}-{last}"], depth) == set(everything[first : last + 1])
    top = data.draw(st.integers(1, depth))
    assert select_blocks([f"top-{top}"], depth) == set(everything[-top:])
    assert check_blocks([index, f"{first}-{last}", f"top-{top}"], {"layer": depth}) == []
    assert len(check_blocks([depth, -depth - 1, f"top-{depth + 1}"], {"layer": depth})) == 3


def test_an_entry_must_fit_one_list_only() -> None:
    assert check_blocks(["top-4", 5], {"encoder": 6, "decoder": 2}) == []
    assert select_blocks(["top-4", 5], 2) == {0, 1}
    assert len(check_blocks(["5-6"], {"encoder": 6, "decoder": 2})) == 1


def test_no_list_at_all_is_one_problem() -> None:
    assert [p.id for p in check_blocks([0, 1], {})] == ["lora.no-such-block"]


@pytest.mark.parametrize("pattern", ["layer", "encoder.layer", "layers", "experts"])
@pytest.mark.parametrize(
    "name", ["bert.encoder.layer.3.a", "layer.3.a", "x.layers.1.experts.3.w", "x.sublayer.3.a"]
)
def test_pattern_as_in_peft(name: str, pattern: str) -> None:
    # The expression of peft.tuners.tuners_utils.check_target_module_exists.
    found = re.match(rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\.", name)
    assert in_pattern(name, [3], [pattern]) == (found is not None and found["idx"] == "3")


@pytest.mark.parametrize(
    ("names", "text"),
    [
        ([f"bert.layer.{i}.q" for i in range(12)], "0-11"),
        (["h.0.a", "h.2.a", "h.1.a", "h.5.a"], "0-2, 5"),
        (["model.encoder.layers.0.q", "model.decoder.layers.0.q"], "encoder 0, decoder 0"),
        (["embeddings"], ""),
        (["embeddings", "h.0.a"], "0, outside"),
    ],
)
def test_description(names: list[str], text: str) -> None:
    assert describe_blocks(names) == text

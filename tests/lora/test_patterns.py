"""Names of layers as a person writes them."""

import pytest

from lora_cli.lora.patterns import is_inside, last_parts, matches, outermost

NAME = "bert.encoder.layer.10.attention.self.query"


@pytest.mark.parametrize(
    "pattern",
    [
        NAME,
        "query",
        "self.query",
        "attention.self.query",
        "q*",
        "quer[xy]",
        "*.layer.10.*",
        "*attention*",
    ],
)
def test_matches(pattern: str) -> None:
    assert matches(pattern, NAME)


@pytest.mark.parametrize(
    "pattern",
    ["Query", "uery", "key", "f.query", "layer.10", "*.layer.1.*", "self", "query.*", ""],
)
def test_does_not_match(pattern: str) -> None:
    assert not matches(pattern, NAME)


def test_inside_is_by_whole_parts() -> None:
    assert is_inside("a.b.c", ("x", "a.b"))
    assert is_inside("a.b", ("a.b",))
    assert not is_inside("a.bc", ("a.b",))
    assert not is_inside("a", ("a.b",))
    assert not is_inside("a", ())


def test_last_parts_are_sorted_without_repeats() -> None:
    assert last_parts(["b.query", "a.query", "a.key", "head"]) == ("head", "key", "query")


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("query", "query"),
        ("attn.base_layer.out_proj", "attn"),
        ("experts.base_layer", "experts"),
        ("experts.base_layer.base_layer", "experts"),
        ("a.base", "a.base"),
    ],
)
def test_adapters_within_one_layer_belong_to_the_outermost(name: str, layer: str) -> None:
    assert outermost(name) == layer

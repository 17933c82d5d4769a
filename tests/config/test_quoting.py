import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from lora_cli.config.compose import parse_override
from lora_cli.config.quoting import (
    escape_references,
    quote_keys,
    quote_list,
    quote_text,
    repeated_key,
)

TEXTS = st.text(alphabet=st.sampled_from(list("a '\"\\${}[](),:=.\n~+-#%&|é")), max_size=12)


@given(TEXTS)
def test_hydra_and_omegaconf_give_the_text_back(text: str) -> None:
    parsed = parse_override(f"x={quote_text(text)}", literal=True, extra=None)
    assert not parsed.is_sweep
    assert parsed.typed == f"x={text}"
    assert OmegaConf.create({"x": parsed.values[0]}).x == text


@given(TEXTS)
def test_escaped_references_are_not_looked_up(text: str) -> None:
    assert OmegaConf.create({"x": escape_references(text)}).x == text


def parsed(text: str) -> tuple[object, ...]:
    return parse_override(f"x={text}", literal=True, extra=None).values


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("[runs/a,runs/b]", ["runs/a", "runs/b"]),
        ("[ runs/a , runs/b ]", ["runs/a", "runs/b"]),
        ("[/tmp/a=b,data(1),it's,x y,${z}]", ["/tmp/a=b", "data(1)", "it's", "x y", r"\${z}"]),
        ("['a, b',\"c]\"]", ["a, b", "c]"]),
        ("[]", []),
        ("[a]", ["a"]),
        ("runs/a", "runs/a"),
        ("a,b", "a,b"),
    ],
)
def test_lists_of_paths_mean_what_they_say(typed: str, meant: object) -> None:
    assert parsed(quote_list(typed)) == (meant,)


def test_a_sweep_over_lists_stays_one() -> None:
    assert parsed(quote_list("[a,b],[c]")) == (["a", "b"], ["c"])


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ('{query:4,"*.layer.0.*":16}', {"query": 4, "*.layer.0.*": 16}),
        ("{ 'q[kv]' : 4 , b : 3 }", {"q[kv]": 4, "b": 3}),
        ("{q[kv]:4}", {"q[kv]": 4}),
        (r"{q\[kv\]:4}", {"q[kv]": 4}),
        ('{"a, b: {c}=(d)":1}', {"a, b: {c}=(d)": 1}),
        ("{}", {}),
        ("{a:2.5}", {"a": 2.5}),
    ],
)
def test_names_in_a_mapping_may_be_quoted(typed: str, meant: object) -> None:
    assert parsed(quote_keys(typed)) == (meant,)


def test_a_sweep_over_mappings() -> None:
    found = parse_override(
        "x=" + quote_keys("{a:1},{'b.*':2,'[c]':3},{}"), literal=False, extra=None
    )
    assert found.values == ({"a": 1}, {"b.*": 2, "[c]": 3}, {})
    assert [parse_override(text, literal=False, extra=None).values for text in found.texts] == [
        (value,) for value in found.values
    ]


@pytest.mark.parametrize(
    ("text", "name"),
    [("{a:1,a:2}", "a"), ('{a:1,"a":2}', "a"), ("{a:1},{a:2}", None), ("{a:1,b:1}", None)],
)
def test_a_name_that_comes_twice_is_found(text: str, name: str | None) -> None:
    assert repeated_key(text) == name

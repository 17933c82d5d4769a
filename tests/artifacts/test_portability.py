"""How rules are asked, and that they withstand any config."""

import inspect
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from stranger_adapters import CONFIG, errors, findings, ids, look, write_adapter

from lora_cli.artifacts import portability_vllm
from lora_cli.artifacts.portability import EVERY, VERSIONS, Found, Rule, find_problems, listed
from lora_cli.artifacts.portability_table import RULES


def test_sound_adapter_of_another_program_has_nothing(tmp_path: Path) -> None:
    assert findings(write_adapter(tmp_path / "a")) == []


def test_errors_come_first_and_only_programs_that_were_asked_for(tmp_path: Path) -> None:
    adapter = look(write_adapter(tmp_path / "a"))
    rules = [
        Rule("a", ("peft", "vllm"), "warning", "s", lambda _: [Found("one", "fix")]),
        Rule("b", ("vllm",), "error", "s", lambda _: [Found("two", "fix"), Found("three", "fix")]),
        Rule("c", ("transformers",), "error", "s", lambda _: [Found("four", "fix")]),
    ]
    found = find_problems(adapter, rules, ("vllm",))
    assert [(x.id, x.text, x.runtimes) for x in found] == [
        ("b", "two", ("vllm",)),
        ("b", "three", ("vllm",)),
        ("a", "one", ("vllm",)),
    ]


def test_long_lists_are_cut() -> None:
    assert listed("abc") == "a, b, c"
    assert listed("abcd") == "a, b, c and 1 more"


def test_rows_of_the_table_are_whole() -> None:
    assert len(RULES) > 40
    assert len({rule.id for rule in RULES}) == len(RULES)
    for rule in RULES:
        assert rule.source
        assert set(rule.runtimes) <= set(EVERY)
        assert inspect.isgeneratorfunction(rule.find)
    assert set(VERSIONS) == set(EVERY)


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 600) | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=4,
)
_FIELDS = [
    *CONFIG,
    *("rank_pattern", "alpha_pattern", "modules_to_save", "target_parameters", "peft_version"),
    *("layers_to_transform", "exclude_modules", "init_lora_weights", "use_dora", "use_rslora"),
    *("bias", "lora_bias", "trainable_token_indices", "layers_pattern"),
]


@given(config=st.dictionaries(st.sampled_from(_FIELDS), _VALUES))
def test_no_config_breaks_a_rule(
    config: dict[str, object], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = write_adapter(tmp_path_factory.mktemp("any"))
    (folder / "adapter_config.json").write_text(json.dumps(config))
    findings(folder)


def test_every_error_says_what_to_do(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a", use_dora=True, bias="all", r=600)
    for finding in findings(folder):
        assert finding.fix
        assert finding.text
    assert {"vllm.dora", "vllm.bias", "vllm.rank", "llama.cpp.dora"} <= errors(folder)
    assert "vllm.dora" not in ids(folder, "peft")
    assert portability_vllm.MAX_RANKS[-1] == 512

from typing import Any

import pytest

from lora_cli.config.compose import composing, parse_override, read_values, register_bases
from lora_cli.errors import UserError


def test_a_sweep_is_listed() -> None:
    found = parse_override("lora.r=4,8", literal=False, extra=None)
    assert found.is_sweep
    assert found.values == (4, 8)
    assert found.texts == ("lora.r=4", "lora.r=8")
    assert parse_override("seed=range(0,3)", literal=False, extra=None).values == (0, 1, 2)
    assert parse_override("lora.r=interval(0,1)", literal=False, extra=None).texts == ()
    globbed = parse_override("optimizer=glob(ada*)", literal=False, extra=None)
    assert globbed.texts == ("optimizer=adafactor", "optimizer=adamw", "optimizer=adamw_8bit")


def test_numbers_of_yaml_are_numbers() -> None:
    assert read_values("a: 1e-3\nb: 2.5e-05\nc: '1e-3'\nd: ${a}\n") == {
        "a": 1e-3,
        "b": 2.5e-05,
        "c": "1e-3",
        "d": "${a}",
    }


def test_composing_gives_plain_values() -> None:
    register_bases()
    with composing("train", extra=None) as compose:
        found = compose(["model=bert", "++lora.r=3"])
        assert found.plain["lora"]["r"] == 3
        assert found.choices["model"] == "bert"
        changed = found.replaced({"lora.rank_pattern": {"key": 2}, "seed": 7})
        assert (changed["lora"]["rank_pattern"], changed["seed"]) == ({"key": 2}, 7)
        assert found.replaced({}) == found.plain
        assert (found.plain["lora"]["rank_pattern"], found.plain["seed"]) == ({}, 42)
        with pytest.raises(UserError, match="must compose"):
            compose(["model=none"])


def test_hydra_flags_show_and_run_nothing(compose_all: Any, capsys: Any) -> None:
    assert compose_all("train", "model=bert", "--cfg", "job", "-p", "model") == []
    assert "google-bert/bert-base-uncased" in capsys.readouterr().out

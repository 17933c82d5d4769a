import dataclasses
from typing import Any

import pytest

from lora_cli.config.generation import (
    SAMPLING,
    GenerationConfig,
    GenerationOverrides,
    check_generation,
)
from lora_cli.config.schema import field_docs


def problems(section: str, given: str = "", **settings: Any) -> list[Any]:
    names = frozenset(given.split())
    return list(check_generation(GenerationConfig(**settings), section=section, given=names))


def test_overrides_are_the_same_settings() -> None:
    fields = {one.name: one for one in dataclasses.fields(GenerationConfig)}
    others = {one.name: one for one in dataclasses.fields(GenerationOverrides)}
    assert list(others) == list(fields)
    assert field_docs(GenerationOverrides) == field_docs(GenerationConfig)
    for name, one in fields.items():
        bounds = {key: value for key, value in one.metadata.items() if key != "only"}
        assert others[name].metadata == bounds
        assert others[name].default is None
    assert {name for name, one in fields.items() if "only" in one.metadata} == set(SAMPLING)


def test_what_is_not_given_stays_as_it_was() -> None:
    config = GenerationConfig(max_new_tokens=7, num_beams=3, stop=("x",))
    assert GenerationOverrides().applied_to(config) == config
    changes = GenerationOverrides(num_beams=1, stop=())
    assert changes.given() == {"num_beams": 1, "stop": ()}
    assert changes.applied_to(config) == GenerationConfig(max_new_tokens=7)


@pytest.mark.parametrize("section", ["task.generation", "generation"])
def test_beams_are_not_drawn(section: str) -> None:
    (found,) = problems(section, do_sample=True, num_beams=2)
    assert (found.id, found.key) == ("config.contradiction", f"{section}.num_beams")
    assert not problems(section, num_beams=2)


def test_settings_without_an_effect() -> None:
    (found,) = problems("task.generation", "length_penalty", length_penalty=2.0)
    assert found.message == (
        "`task.generation.length_penalty` must be left out with task.generation.num_beams=1, "
        "which has no such setting, but is 2.0."
    )
    assert not problems("task.generation", "length_penalty", length_penalty=2.0, num_beams=2)
    assert not problems("task.generation", "", length_penalty=2.0)
    # For training the metadata says it.
    assert not problems("task.generation", "temperature", temperature=2.0)
    (found,) = problems("generation", "temperature max_new_tokens", temperature=2.0)
    assert found.key == "generation.temperature"
    assert not problems("generation", "temperature", temperature=2.0, do_sample=True)


def test_stop_texts_are_not_empty() -> None:
    (found,) = problems("generation", stop=("x", ""))
    assert (found.id, found.key) == ("config.bad-value", "generation.stop")

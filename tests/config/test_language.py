"""The settings of families that generate: what is refused, by their metadata."""

from dataclasses import fields
from types import SimpleNamespace
from typing import Any, get_args, get_type_hints

import pytest

from lora_cli.config.generation import GenerationConfig
from lora_cli.config.language import CausalLanguageModelingConfig, ChatConfig
from lora_cli.config.task_families import TASKS
from lora_cli.data.messages import ROLES
from lora_cli.tasks.chat_refusals import NOT_GENERATED
from lora_cli.tasks.table import FAMILIES


@pytest.mark.parametrize("config", [ChatConfig, CausalLanguageModelingConfig])
def test_what_is_generated_is_set_in_a_section_of_its_own(config: Any) -> None:
    assert config().generation == GenerationConfig()


def test_packing_is_on_for_texts_and_off_for_conversations() -> None:
    assert CausalLanguageModelingConfig().packing
    assert not ChatConfig().packing
    packs = {
        name for name, config in TASKS.items() if "packing" in {f.name for f in fields(config)}
    }
    assert packs == {"chat", "causal_language_modeling"}
    # Others leave rows as they are.
    rows: Any = [{"id": "1", "measures": {"seconds": 1.0}, "fits": True, "target": [1]}]
    model: Any = SimpleNamespace(config=SimpleNamespace(max_source_positions=1500))
    for name in set(TASKS) - packs:
        assert FAMILIES[name].arrange(TASKS[name](), rows, model) == (rows, ())


def test_metrics_that_need_no_answers_are_those_of_plain_text() -> None:
    chat, text = (
        get_args(get_type_hints(config)["metric"])
        for config in (ChatConfig, CausalLanguageModelingConfig)
    )
    assert set(text) == set(NOT_GENERATED) < set(chat)


def test_every_role_is_one_that_templates_know() -> None:
    assert set(ROLES.values()) == {"system", "user", "assistant", "tool"}
    assert all(ROLES[role] == role for role in ROLES.values())

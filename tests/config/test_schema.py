import dataclasses

import pytest

from lora_cli.config.adapters import LoraConfig
from lora_cli.config.commands import COMMANDS, VARIANTS
from lora_cli.config.language import AnswerChoiceConfig, AnswerSettings
from lora_cli.config.optim import SgdConfig
from lora_cli.config.schema import (
    all_keys,
    base_node,
    field_docs,
    flatten,
    iter_keys,
    mapping_settings,
    nest,
    package_folder,
    select,
    short_type,
    show,
    to_plain,
)
from lora_cli.config.tasks import TextRegressionConfig, TokenClassificationConfig


def test_keys_carry_what_help_shows() -> None:
    key = all_keys("train")["lora.r"]
    assert (key.default, dict(key.metadata)) == (8, {"min": 1})
    assert key.help.startswith("Rank of the update")
    assert short_type(all_keys("train")["lora.targets"].annotation, {}) == (
        "[text, ...]|auto|all-linear"
    )


def test_an_underscore_is_no_part_of_a_key() -> None:
    assert {"from", "format"} <= set(all_keys("export"))
    assert {"from", "input", "format"} <= set(all_keys("predict"))
    assert all_keys("predict")["input"].is_path


def test_keys_of_all_variants_are_known() -> None:
    keys = all_keys("train")
    assert {"optimizer.momentum", "optimizer.betas", "scheduler.power"} <= set(keys)
    names = {key.name for key in iter_keys(COMMANDS["train"], variants={"optimizer": SgdConfig})}
    assert "optimizer.momentum" in names
    assert "optimizer.betas" not in names


def test_the_base_leaves_variants_to_their_groups() -> None:
    assert set(base_node("train")) == {
        *("model", "lora", "trainer", "run", "adapter", "adapter_mode", "seed"),
        *("tracker", "tracking", "distributed", "smoke"),
    }
    assert "task" in base_node("eval")
    assert set(base_node("targets")) == {"model", "lora", "ranks", "num_labels"}
    assert set(VARIANTS) == {"task", "strategy", "optimizer", "scheduler"}


@pytest.mark.parametrize("command", COMMANDS)
def test_flatten_and_nest_undo_each_other(command: str) -> None:
    plain = to_plain(COMMANDS[command]())
    assert nest(flatten(plain)) == plain
    assert all(select(plain, name) == value for name, value in flatten(plain).items())
    assert select(plain, "no.such") is None


def test_values_are_shown_as_they_are_typed() -> None:
    assert [show(value) for value in (None, True, (1, "a"), 0.5, {"a": 1, "b.*": None}, {})] == [
        "null",
        "true",
        "[1, a]",
        "0.5",
        "{a: 1, b.*: null}",
        "{}",
    ]


def test_a_mapping_is_one_setting() -> None:
    assert mapping_settings() == {"lora.rank_pattern", "lora.alpha_pattern", "task.answers"}
    pattern = {"query": 4, "*.layer.0.*": 16}
    plain = {"lora": {"r": 3, "rank_pattern": pattern, "alpha_pattern": {}}}
    leaves = {"lora.r": 3, "lora.rank_pattern": pattern, "lora.alpha_pattern": {}}
    assert flatten(plain) == leaves
    assert nest(leaves) == plain
    assert flatten({"rank_pattern": pattern}, "lora.") == {"lora.rank_pattern": pattern}
    key = all_keys("train")["lora.rank_pattern"]
    assert key.is_mapping
    assert short_type(key.annotation, {}) == "{name: int, ...}"
    assert not all_keys("train")["lora.r"].is_mapping


def test_plain_values_share_nothing_with_the_config() -> None:
    config = LoraConfig(rank_pattern={"query": 4})
    to_plain(config)["rank_pattern"]["key"] = 2
    assert config.rank_pattern == {"query": 4}


def test_lists_are_known() -> None:
    keys = all_keys("merge") | all_keys("train")
    assert {name for name, key in keys.items() if key.is_list and key.is_text} == {
        *("adapters", "lora.trainable_tokens", "task.data.choice_columns"),
        "task.data.label_columns",
        "task.generation.stop",
        "task.zero_shot.labels",
    }
    assert {"lora.layers", "task.data.label_names", "weights"} <= {
        name for name, key in keys.items() if key.is_list
    }
    assert not keys["optimizer.betas"].is_list


def test_conditions_of_a_section_hold_for_its_settings() -> None:
    key = all_keys("train")["lora.eva.rows"]
    assert list(key.only) == ["strategy.name", "lora.variant", "lora.init"]
    assert all_keys("targets")["lora.eva.rows"].only["lora.init"] == ("eva",)
    assert "strategy.name" not in all_keys("targets")["lora.eva.rows"].only
    assert all_keys("train")["seed"].only == {}


def test_the_folders_that_travel_with_the_program_exist() -> None:
    assert (package_folder("configs") / "train.yaml").is_file()
    assert list(package_folder("recipes").glob("*.yaml"))


def test_docs_are_read_from_the_source() -> None:
    assert field_docs(SgdConfig)["momentum"] == "Share of the last update that is kept."


def test_docs_of_a_base_hold_where_a_class_has_no_others() -> None:
    plain, own = field_docs(TextRegressionConfig), field_docs(TokenClassificationConfig)
    assert plain["family"] == own["family"] != ""
    assert plain["max_length"].endswith("the number cut is reported.")
    assert own["max_length"].endswith("count as tagged O.")
    assert "threshold" not in plain


def test_help_of_what_a_dataclass_is_made_of_is_found() -> None:
    docs = field_docs(AnswerChoiceConfig)
    assert set(docs) == {one.name for one in dataclasses.fields(AnswerChoiceConfig)} - {"data"}
    assert docs["prompt"] == field_docs(AnswerSettings)["prompt"] != ""

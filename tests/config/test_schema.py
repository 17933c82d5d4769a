import pytest

from lora_cli.config.commands import COMMANDS, VARIANTS, SgdConfig
from lora_cli.config.schema import (
    all_keys,
    base_node,
    field_docs,
    flatten,
    iter_keys,
    nest,
    package_folder,
    select,
    short_type,
    show,
    to_plain,
)


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
    assert set(base_node("train")) == {"model", "lora", "trainer", "run", "seed"}
    assert "task" in base_node("eval")
    assert set(VARIANTS) == {"task", "optimizer", "scheduler"}


@pytest.mark.parametrize("command", COMMANDS)
def test_flatten_and_nest_undo_each_other(command: str) -> None:
    plain = to_plain(COMMANDS[command]())
    assert nest(flatten(plain)) == plain
    assert all(select(plain, name) == value for name, value in flatten(plain).items())
    assert select(plain, "no.such") is None


def test_values_are_shown_as_they_are_typed() -> None:
    assert [show(value) for value in (None, True, (1, "a"), 0.5)] == [
        "null",
        "true",
        "[1, a]",
        "0.5",
    ]


def test_the_folders_that_travel_with_the_program_exist() -> None:
    assert (package_folder("configs") / "train.yaml").is_file()
    assert list(package_folder("recipes").glob("*.yaml"))


def test_docs_are_read_from_the_source() -> None:
    assert field_docs(SgdConfig)["momentum"] == "Share of the last update that is kept."

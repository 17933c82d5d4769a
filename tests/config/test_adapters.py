import dataclasses

import pytest

from lora_cli.config.adapters import LoraConfig
from lora_cli.config.commands import VARIANTS
from lora_cli.config.schema import Key, all_keys

KEYS = all_keys("train")
EVERY = {"lora", "dora", "lora_fa", "adalora", "vera"}
COMMON = {"r", "dropout", "bias", "targets", "exclude", "layers", "modules_to_save"}


def read_by(variant: str, init: str = "kaiming") -> set[str]:
    """Return the settings of `lora` that count with a variant and start, by first name."""
    chosen = {"lora.variant": variant, "lora.init": init, "strategy.name": "lora"}

    def is_read(key: Key) -> bool:
        return all(chosen[name] in values for name, values in key.only.items())

    return {
        name.split(".")[1]
        for name, key in KEYS.items()
        if name.startswith("lora.") and is_read(key)
    } - {"variant"}


def test_what_each_variant_reads() -> None:
    plain = read_by("lora")
    nested = {"eva", "adalora", "vera"}
    fields = {field.name for field in dataclasses.fields(LoraConfig)} - {"variant", "pissa_niter"}
    assert plain == fields - nested
    assert read_by("lora_fa") == plain
    assert read_by("dora") == plain - {"lora_bias", "target_parameters"}
    assert read_by("adalora") == COMMON | {"alpha", "trainable_tokens", "adalora"}
    assert read_by("vera") == COMMON | {"vera"}


def test_what_each_start_reads() -> None:
    plain = read_by("lora")
    assert read_by("lora", "gaussian") == plain - {"lora_bias"}
    assert read_by("lora", "olora") == plain - {"lora_bias", "target_parameters"}
    assert read_by("lora", "pissa") == read_by("lora", "olora") | {"pissa_niter"}
    assert read_by("lora", "eva") == read_by("lora", "olora") | {"eva"}


@pytest.mark.parametrize(
    "name", [name for name in KEYS if name.startswith("lora.") or name.endswith("plus_ratio")]
)
def test_everything_of_lora_needs_a_strategy_with_lora(name: str) -> None:
    assert KEYS[name].only["strategy.name"] == ("lora", "lora_then_full")


def test_conditions_name_settings_and_values_that_exist() -> None:
    found = 0
    for command in ("train", "merge", "targets"):
        # A section that two commands share may name a setting that only one of them has.
        keys = KEYS | all_keys(command)
        for key in all_keys(command).values():
            for selector, values in key.only.items():
                assert selector in keys
                annotation = keys[selector].annotation
                section, _, field = selector.rpartition(".")
                options = set(getattr(annotation, "__args__", ()))
                if section in VARIANTS and VARIANTS[section][0] == field:
                    options = set(VARIANTS[section][1])
                assert set(values) <= options
                found += 1
    assert found > 20

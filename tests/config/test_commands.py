from lora_cli.config.commands import COMMANDS, VARIANTS
from lora_cli.config.groups import configs_dir


def test_each_command_has_a_primary_config() -> None:
    names = {path.stem for path in configs_dir().glob("*.yaml")}
    assert names == set(COMMANDS)


def test_a_variant_carries_its_own_name() -> None:
    for tag, table in VARIANTS.values():
        for name, cls in table.items():
            assert getattr(cls(), tag) == name

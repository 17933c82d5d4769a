import dataclasses

from lora_cli.cli.argv import OUR_FLAGS
from lora_cli.commands.options import Options


def test_every_option_is_a_flag_that_is_off() -> None:
    assert sorted(OUR_FLAGS.values()) == sorted(field.name for field in dataclasses.fields(Options))
    assert not any(dataclasses.astuple(Options()))

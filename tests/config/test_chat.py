from lora_cli.config.chat import TalkConfig
from lora_cli.config.generation import GenerationOverrides
from lora_cli.config.schema import all_keys


def test_it_has_the_settings_of_generation() -> None:
    keys = set(all_keys("chat"))
    assert {"from", "base", "system", "generation.seed"} < keys
    assert {name for name in keys if name.startswith("generation.")} == {
        name for name in all_keys("predict") if name.startswith("generation.")
    }
    assert TalkConfig().generation == GenerationOverrides()

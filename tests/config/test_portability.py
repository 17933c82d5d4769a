"""Settings of `lora-cli check`."""

from lora_cli.config.portability import CheckConfig, check_for


def test_programs_must_be_named() -> None:
    assert [problem.key for problem in check_for(CheckConfig(from_="a", for_=()), ())] == ["for"]
    assert list(check_for(CheckConfig(from_="a"), ())) == []
    assert CheckConfig().for_ == ("peft", "transformers", "vllm", "llama.cpp")

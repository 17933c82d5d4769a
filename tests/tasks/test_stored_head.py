import transformers

from lora_cli.tasks.stored_head import find_head


def test_the_class_that_config_names_tells_the_head() -> None:
    config = transformers.LlamaConfig(architectures=["LlamaForCausalLM"])
    assert find_head(config) == ("AutoModelForCausalLM", "CAUSAL_LM")
    assert find_head(transformers.LlamaConfig(architectures=["LlamaModel"])) == ("AutoModel", None)
    assert find_head(transformers.LlamaConfig(architectures=["Other"])) is None
    assert find_head(transformers.LlamaConfig()) is None

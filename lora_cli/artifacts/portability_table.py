"""All portability rules, in the order in which they are told."""

from lora_cli.artifacts import (
    portability_base,
    portability_common,
    portability_gguf,
    portability_peft,
    portability_vllm,
)

RULES = (
    *portability_common.RULES,
    *portability_peft.RULES,
    *portability_base.RULES,
    *portability_vllm.RULES,
    *portability_gguf.RULES,
)

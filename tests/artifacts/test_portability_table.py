"""For each rule of the table an adapter that breaks it, and nothing else that is told of it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from stranger_adapters import PREFIX, factors, ids, write_adapter

from lora_cli.artifacts.inspection import BaseShapes
from lora_cli.artifacts.portability_table import RULES

LAYER = "model.layers.0.self_attn.q_proj"
A, B = f"{PREFIX}{LAYER}.lora_A.weight", f"{PREFIX}{LAYER}.lora_B.weight"
BASE = BaseShapes(
    modules=frozenset({LAYER, "lm_head", "model.embed_tokens"}),
    sizes={LAYER: (16, 12), "lm_head": (16, 12), "model.embed_tokens": (20, 16)},
    weights={"model.embed_tokens.weight": (20, 16), "lm_head.weight": (12, 16)},
    tied=frozenset(),
    prefix="model.",
)
TIED = BaseShapes(
    modules=BASE.modules,
    sizes=BASE.sizes,
    weights=BASE.weights,
    tied=frozenset({"lm_head", "model.embed_tokens"}),
    prefix="model.",
)


def plus(**more: torch.Tensor) -> dict[str, torch.Tensor]:
    return {**factors(), **{f"{PREFIX}{name}": tensor for name, tensor in more.items()}}


def drop(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def put(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


def swap(old: str, new: str) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        (folder / old).rename(folder / new)

    return change


EMBEDDING = {
    f"{PREFIX}model.embed_tokens.lora_embedding_A": torch.ones(4, 20),
    f"{PREFIX}model.embed_tokens.lora_embedding_B": torch.ones(16, 4),
}
CONV = {A: torch.ones(4, 16, 3, 3), B: torch.ones(12, 4, 1, 1)}
VECTOR = {f"{LAYER}.lora_magnitude_vector": torch.ones(12)}
TOKENS = {"model.embed_tokens.token_adapter.trainable_tokens_delta": torch.ones(2, 16)}
EXPERTS = {"target_parameters": ["experts.down_proj"], "peft_version": "0.21.2"}
HEAD = {"score.weight": torch.ones(3, 16)}
# What vLLM and llama.cpp say of a kind that is not LoRA.
OTHER_KIND = {"vllm.kind", "llama.cpp.kind"}
_LAYERS = {"vllm.layers", "llama.cpp.layers"}
_BY_NAME = {"base.layers", "base.layers-by-end"}

Case = tuple[dict[str, torch.Tensor] | None, dict[str, Any], Callable[[Path], object] | None]
# Each: tensors, fields of the config, a change of the files; then the base, and all rules that
# find something.
CASES: list[tuple[Case, BaseShapes | None, set[str]]] = [
    ((None, {}, drop("adapter_config.json")), None, {"config.unreadable"}),
    ((None, {"r": 0}, None), None, {"config.value"}),
    ((None, {"lora_alpha": "8"}, None), None, {"config.value"}),
    ((None, {}, drop("adapter_model.safetensors")), None, {"file.weights"}),
    ((None, {}, put("adapter_model.safetensors", b"x")), None, {"file.weights"}),
    (
        (None, {}, swap("adapter_model.safetensors", "adapter_model.bin")),
        None,
        {"file.pickle", "file.no-safetensors"},
    ),
    ((None, {}, put("adapter_model.bin", b"")), None, {"file.second"}),
    (
        ({A: torch.ones(4, 16), B: torch.full((12, 4), torch.inf)}, {}, None),
        None,
        {"value.not-finite"},
    ),
    (
        ({A: torch.ones(4, 16), B: torch.ones(12, 4, dtype=torch.int8)}, {}, None),
        None,
        {"value.kind"},
    ),
    (({A: torch.ones(4, 16), B: torch.zeros(12, 4)}, {}, None), None, {"value.zero"}),
    ((plus(**{f"{LAYER}.lora_down.weight": torch.ones(2)}), {}, None), None, {"key.stray"}),
    (
        (
            {
                A.replace(".w", ".me.w"): torch.ones(4, 16),
                B.replace(".w", ".me.w"): torch.ones(12, 4),
            },
            {},
            None,
        ),
        None,
        {"key.adapter-name"},
    ),
    (({A: torch.ones(4, 16)}, {}, None), None, {"key.half"}),
    (({A: torch.ones(4, 16), B: torch.ones(4, 12)}, {}, None), None, {"shape.factors"}),
    ((None, {"base_model_name_or_path": "/data/model"}, None), None, {"base.local"}),
    ((None, {"base_model_name_or_path": None}, None), None, {"base.unnamed"}),
    (
        (plus(**HEAD), {"task_type": "SEQ_CLS", "modules_to_save": ["score"]}, None),
        None,
        {"head.labels", "vllm.head", "llama.cpp.whole"},
    ),
    ((None, {"peft_type": ...}, None), None, {"config.no-type"}),
    ((None, {"strange": 1}, None), None, {"config.unknown-field"}),
    (
        ({name.removeprefix(PREFIX): x for name, x in factors().items()}, {}, None),
        None,
        {"key.prefix"},
    ),
    ((None, {"target_modules": ["v_proj"]}, None), None, {"key.untargeted"}),
    ((None, {"r": 8}, None), None, {"shape.rank"}),
    ((None, {"task_type": "TOKEN_CLS"}, None), None, {"head.absent"}),
    (
        (None, {"use_dora": True}, None),
        None,
        {"dora.magnitude", "vllm.dora", "llama.cpp.dora"},
    ),
    (
        (plus(**VECTOR), {"use_dora": True}, None),
        None,
        {"transformers.dora", "vllm.dora", "llama.cpp.dora"},
    ),
    (
        ({"prompt_embeddings": torch.ones(2, 16)}, {"peft_type": "PROMPT_TUNING"}, None),
        None,
        {"transformers.kind", *OTHER_KIND},
    ),
    (
        (None, {"init_lora_weights": "pissa_niter_16"}, None),
        None,
        {"peft.start", "vllm.features", "llama.cpp.features"},
    ),
    (
        (None, {**EXPERTS, "peft_version": "0.18.0"}, None),
        None,
        {"peft.experts", "vllm.experts", "llama.cpp.experts"},
    ),
    ((None, EXPERTS, None), None, {"vllm.experts", "llama.cpp.experts"}),
    (
        (
            {**factors("attn.base_layer.out_proj"), **factors("attn")},
            {"target_modules": ["attn"]},
            None,
        ),
        None,
        {"peft.attention"},
    ),
    ((factors("model.layers.9.self_attn.q_proj"), {}, None), BASE, _BY_NAME),
    ((factors("layers.0.self_attn.q_proj"), {}, None), BASE, {"base.layers"}),
    (({A: torch.ones(4, 8), B: torch.ones(12, 4)}, {}, None), BASE, {"base.sizes"}),
    (
        (
            plus(**{"model.embed_tokens.weight": torch.ones(22, 16)}),
            {"modules_to_save": ["embed_tokens"]},
            None,
        ),
        BASE,
        {"base.resized", "vllm.whole", "llama.cpp.whole"},
    ),
    (
        (EMBEDDING, {"target_modules": ["embed_tokens"]}, None),
        TIED,
        {"base.tied", "vllm.embeddings"},
    ),
    ((EMBEDDING, {"target_modules": ["embed_tokens"]}, None), BASE, {"vllm.embeddings"}),
    (
        (factors("lm_head"), {"target_modules": ["lm_head"]}, None),
        TIED,
        {"base.tied", "vllm.embeddings", "llama.cpp.tied-head"},
    ),
    ((None, {"modules_to_save": ["nothere"]}, None), BASE, {"base.saved", "vllm.whole"}),
    ((None, {"peft_type": "LOHA"}, None), None, OTHER_KIND),
    ((None, {"peft_type": "LORO"}, None), None, {"config.unknown-type", *OTHER_KIND}),
    ((None, {"target_modules": ...}, None), None, {"vllm.required"}),
    ((factors(r=600), {"r": 600}, None), None, {"vllm.rank"}),
    ((factors(r=17), {"r": 17}, None), None, {"vllm.max-lora-rank"}),
    ((factors(r=16), {"r": 16}, None), None, set()),
    (
        (
            plus(**{"lm_head.weight": torch.ones(12, 16)}),
            {"modules_to_save": ["lm_head"]},
            None,
        ),
        BASE,
        {"vllm.whole", "llama.cpp.whole"},
    ),
    (
        (plus(**{"model.embed_tokens.base_layer.weight": torch.ones(20, 16)}), {}, None),
        BASE,
        set(),
    ),
    (
        (plus(**{f"{LAYER}.lora_B.bias": torch.ones(12)}), {"lora_bias": True}, None),
        None,
        {"vllm.bias", "llama.cpp.whole"},
    ),
    ((None, {"bias": "lora_only"}, None), None, {"vllm.bias"}),
    (
        (plus(**TOKENS), {"trainable_token_indices": [1, 2]}, None),
        None,
        {"vllm.tokens", "llama.cpp.whole"},
    ),
    (
        (None, {"r": 8, "rank_pattern": {"q_proj": 4}}, None),
        None,
        {"vllm.patterns"},
    ),
    # The same scale in another way.
    (
        (None, {"r": 8, "rank_pattern": {"q_proj": 4}, "alpha_pattern": {"q_proj": 4}}, None),
        None,
        {"llama.cpp.alpha-pattern"},
    ),
    ((None, {"use_qalora": True}, None), None, {"vllm.features", "llama.cpp.features"}),
    ((None, {"alora_invocation_tokens": [1]}, None), None, {"vllm.features"}),
    ((CONV, {}, None), None, _LAYERS),
    ((None, {"lora_alpha": ...}, None), None, {"vllm.required", "llama.cpp.alpha"}),
    ((None, {"use_rslora": True}, None), None, {"llama.cpp.rslora"}),
    ((factors(r=1), {"use_rslora": True, "r": 1}, None), None, set()),
    (
        (None, {"alpha_pattern": {"q_proj": 16}}, None),
        None,
        {"vllm.patterns", "llama.cpp.alpha-pattern"},
    ),
    ((None, {}, None), BASE, set()),
    ((None, {}, None), TIED, set()),
]


@pytest.mark.parametrize("number", range(len(CASES)))
def test_what_is_found(number: int, tmp_path: Path) -> None:
    (tensors, fields, change), base, expected = CASES[number]
    folder = write_adapter(tmp_path / "a", tensors, **fields)
    if change is not None:
        change(folder)
    assert ids(folder, base=base) == expected


def test_warnings_are_what_another_setting_or_word_helps_against() -> None:
    assert {rule.id for rule in RULES if rule.severity == "warning"} == {
        *("file.pickle", "file.second", "value.zero", "base.local", "base.unnamed", "head.labels"),
        *("config.unknown-field", "peft.start", "peft.attention", "base.tied", "base.saved"),
        *("vllm.max-lora-rank", "vllm.experts", "vllm.embeddings"),
    }


def test_every_rule_has_a_case() -> None:
    covered = set().union(*(expected for _, _, expected in CASES))
    assert {rule.id for rule in RULES} == covered

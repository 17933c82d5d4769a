from typing import Any

import pytest
import torch

from lora_cli.artifacts.peft_methods import default_config, method_fields, peft_type
from lora_cli.artifacts.peft_tensors import (
    adapted_names,
    from_peft_name,
    place_tensors,
    to_peft_name,
)
from lora_cli.lora.settings import AdaLoraSettings, LoraSettings

PREFIX = "base_model.model."
ADALORA = LoraSettings(
    r=2, alpha=1.0, variant="adalora", adalora=AdaLoraSettings(init_r=4, total_steps=9)
)
VERA = LoraSettings(r=3, alpha=1.0, variant="vera")
LORA = LoraSettings(r=3, alpha=1.0)


def place(
    settings: LoraSettings, shapes: dict[str, tuple[int, ...]], **fields: Any
) -> tuple[tuple[str, ...], str]:
    extra = {
        "target_parameters": None,
        "trainable_token_indices": None,
        "modules_to_save": ["head"],
    }
    config = default_config(peft_type(settings)) | extra | method_fields(settings, []) | fields
    tensors = {to_peft_name(name): torch.zeros(shape) for name, shape in shapes.items()}
    tensors |= {key: torch.zeros(1) for key in fields.pop("raw", ())}
    saved, problems = place_tensors(tensors, config, settings, where="file")
    assert all(problem.where == "file" for problem in problems)
    return saved, " ".join(problem.message for problem in problems)


def test_names_of_layers_and_of_what_they_share() -> None:
    names = ["a.q.lora_A", "a.v.lora_A.weight", "a.k.vera_lambda_b", "vera_shared.A", "head.bias"]
    assert adapted_names(names) == {"a.q", "a.v", "a.k"}
    theirs = [to_peft_name(name) for name in names]
    assert theirs[3] == "base_model.vera_A"
    assert theirs[0] == "base_model.model.a.q.lora_A"
    assert [from_peft_name(key) for key in theirs] == names
    # Neither a key without prefix nor our own name of the shared factors is PEFT's.
    for key in ("a.q.lora_A", f"{PREFIX}vera_shared.A"):
        assert from_peft_name(key) == key


HEAD = {"head.weight": (2, 5)}
FACTORS = {"q.lora_A": (4, 5), "q.lora_B": (6, 4), "q.lora_E": (4, 1)}
NARROW = {"q.lora_A": (1, 5), "q.lora_B": (6, 1), "q.lora_E": (1, 1)}


@pytest.mark.parametrize(
    ("shapes", "masks", "found"),
    [
        (FACTORS, None, ""),
        (NARROW, {"q.lora_E": [False, True, False, False]}, ""),
        (NARROW, {"q.lora_E.default": [False, True, False, False]}, ""),
        (NARROW, None, "q.lora_A (1, 5)"),
        (FACTORS, {"q.lora_E": [False, True, True, False]}, "q.lora_E (4, 1)"),
        ({"q.lora_A.weight": (4, 5)}, None, "also holds base_model.model.q.lora_A.weight"),
    ],
)
def test_ranks_of_adalora(
    shapes: dict[str, tuple[int, ...]], masks: dict[str, list[bool]] | None, found: str
) -> None:
    saved, message = place(ADALORA, shapes | HEAD, rank_pattern=masks)
    assert saved == ("head",)
    assert found in message
    assert bool(found) == bool(message)


SHARED = {"vera_shared.A": (3, 7), "vera_shared.B": (9, 3)}
VECTORS = {"q.vera_lambda_b": (6,), "q.vera_lambda_d": (3,)}


@pytest.mark.parametrize(
    ("shapes", "found"),
    [
        (SHARED | VECTORS, ""),
        (VECTORS, "lacks base_model.vera_A, base_model.vera_B"),
        (SHARED | {"q.vera_lambda_d": (4,)}, "q.vera_lambda_d (4,)"),
        (SHARED | VECTORS | {"vera_shared.A": (7, 3)}, "base_model.vera_A (7, 3)"),
        (SHARED | VECTORS | {"vera_shared.B": (3,)}, "base_model.vera_B (3,)"),
        (SHARED | VECTORS | {"q.lora_A": (3, 5)}, "also holds base_model.model.q.lora_A"),
    ],
)
def test_factors_of_vera(shapes: dict[str, tuple[int, ...]], found: str) -> None:
    saved, message = place(VERA, shapes | HEAD)
    assert saved == ("head",)
    assert found in message
    assert bool(found) == bool(message)


def test_tensors_of_another_method_are_stray() -> None:
    plain = {"q.lora_A.weight": (3, 5), "q.lora_B.weight": (6, 3)}
    assert place(LORA, plain | HEAD) == (("head",), "")
    for shapes in (SHARED, VECTORS, {"q.lora_E": (3, 1)}):
        _, message = place(LORA, plain | HEAD | shapes)
        assert "must hold adapters and listed modules only" in message

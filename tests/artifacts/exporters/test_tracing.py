"""What tracers are given."""

from dataclasses import replace

import torch
from tiny_encoders import make_batch

from lora_cli.artifacts.exporters.contract import ExportInputs
from lora_cli.artifacts.exporters.tracing import (
    LogitsOnly,
    free_sizes,
    in_float32,
    output_names,
    traced_example,
)


def test_no_size_of_an_example_is_one(inputs: ExportInputs) -> None:
    row = make_batch(inputs.model, 1, 9)
    for given in (None, make_batch(inputs.model, 1, 2), row):
        found = traced_example(replace(inputs, example=given), inputs.model)
        assert list(found) == ["input_ids", "token_type_ids", "attention_mask"]
        assert all(len(x) == 2 and x.shape[1] >= 4 for x in found.values())
    found = traced_example(replace(inputs, example=row), inputs.model)
    assert torch.equal(found["input_ids"], row["input_ids"].repeat(2, 1))


def test_a_graph_gives_logits_by_position(inputs: ExportInputs) -> None:
    batch = make_batch(inputs.model, 2, 5)
    names = output_names(inputs.model, batch)
    assert names == ("logits",)
    (logits,) = LogitsOnly(inputs.model, tuple(batch), names)(*batch.values())
    assert torch.equal(logits, inputs.model(**batch).logits)


def test_sizes_of_sequences_are_free_and_those_of_images_are_not() -> None:
    assert set(free_sizes(torch.zeros(2, 5, dtype=torch.long))) == {0, 1}
    assert set(free_sizes(torch.zeros(2, 16000))) == {0, 1}
    assert set(free_sizes(torch.zeros(2, 3, 8, 8))) == {0}


def test_half_precision_is_copied(inputs: ExportInputs) -> None:
    assert in_float32(inputs.model) is inputs.model
    model = torch.nn.Linear(2, 2).bfloat16()
    assert in_float32(model).weight.dtype == torch.float32  # type: ignore[union-attr]
    assert model.weight.dtype == torch.bfloat16

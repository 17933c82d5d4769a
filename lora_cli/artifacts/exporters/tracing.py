"""What tracers need: inputs whose sizes are told apart, and a model that puts out its logits."""

import copy
import inspect
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lora_cli.artifacts.exporters.contract import Candidate, ExportInputs, Refusal
from lora_cli.models.processors import sample_inputs

_PLAIN = ("logits",)
_DETECTING = "AutoModelForObjectDetection"
_WRITING = (
    "AutoModelForCausalLM",
    "AutoModelForSeq2SeqLM",
    "AutoModelForSpeechSeq2Seq",
    "AutoModelForImageTextToText",
)


def why_not_traced(candidate: Candidate) -> Refusal | None:
    """Say why one graph cannot hold a model: those that write run many times for one text."""
    if candidate.auto_class in _WRITING:
        return Refusal(
            reason=f"a model of task={candidate.family} writes token by token, with a cache of "
            "keys and values that the one graph of such a file has not: without it each token "
            "would cost as much as the whole text before it.",
            fix="format=hf, which programs that serve language models read",
        )
    if candidate.auto_class == _DETECTING:
        return Refusal(
            reason=f"a model of task={candidate.family} reads images in many sizes, and such a "
            "file of lora-cli has one size of images.",
            fix="format=hf writes the merged model in its own format",
        )
    return None


def in_float32(model: nn.Module) -> nn.Module:
    """Return the model, or a copy in float32: not every runtime computes in half precision."""
    if any(parameter.dtype != torch.float32 for parameter in model.parameters()):
        return copy.deepcopy(model).float()
    return model


class LogitsOnly(nn.Module):
    """A model whose inputs come by position and whose only outputs are its logits."""

    def __init__(self, model: nn.Module, names: tuple[str, ...], outputs: tuple[str, ...]) -> None:
        super().__init__()
        self.model = model
        self.names = names
        self.outputs = outputs

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the outputs in the order of their names."""
        found = self.model(**dict(zip(self.names, tensors, strict=True)))
        return tuple(getattr(found, name) for name in self.outputs)


def output_names(model: nn.Module, example: Mapping[str, torch.Tensor]) -> tuple[str, ...]:
    """Return the names of the logits that a model puts out, in its order."""
    with torch.no_grad():
        found = model(**example)
    names = list(found) if hasattr(found, "keys") else []
    plain = tuple(name for name in names if name.endswith("logits"))
    # A dual encoder has an embedding of either half, and compares them.
    return plain or tuple(name for name in names if re.search("^logits|_embeds$", name)) or _PLAIN


def traced_example(inputs: ExportInputs, model: nn.Module) -> dict[str, torch.Tensor]:
    """Return inputs to trace with, in the processor's order.

    They have 2 rows, 3 of texts that go with images, more than 3 tokens and, where a model chooses,
    3 choices: no size is 1 or equal to another, which a tracer may take for fixed.
    """
    example = inputs.example
    if example is None or ("input_ids" in example and example["input_ids"].shape[-1] < 4):
        example = sample_inputs(inputs.processor)
    if type(inputs.model).__name__.endswith("ForMultipleChoice"):
        example = {
            name: (value if value.dim() == 3 else value.unsqueeze(1))[:, :1].repeat(1, 3, 1)
            for name, value in example.items()
        }
    accepted = inspect.signature(model.forward).parameters
    rows = {name: 2 + ("pixel_values" in example and name != "pixel_values") for name in example}
    return {
        name: _as_float(torch.cat([example[name]] * 3)[: rows[name]]).contiguous()
        for name in inputs.processor.model_input_names
        if name in example and name in accepted
    }


def _as_float(values: torch.Tensor) -> torch.Tensor:
    """Return float32 where there are numbers of another precision."""
    return values.float() if values.is_floating_point() else values


def free_sizes(values: torch.Tensor) -> dict[int, Any]:
    """Return the sizes that may differ: of tokens and waves all, of images and spectra the rows."""
    is_sequence = values.dim() == 2 or not values.is_floating_point()
    return dict.fromkeys(range(values.dim()) if is_sequence else (0,), torch.export.Dim.DYNAMIC)

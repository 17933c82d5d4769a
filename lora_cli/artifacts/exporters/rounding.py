"""How far rounding to a number format may move what a model says: an experiment, not a guess.

A bound on logits that follows from the format alone would have to grow with the product of the
norms of all layers, and would pass anything. Instead each weight of the merged model is moved at
random, uniformly, by at most as much as the format may move it, and, where the format rounds what
a layer is given as well, each of these values. What that does to the logits on the rows of the
comparison is what rounding explains. A file whose logits are farther off holds something else.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

# From a module and a weight of it, in float32, to the distance of neighbouring numbers of a format
# for each value, broadcastable to the shape of the weight.
Steps = Callable[[nn.Module, torch.Tensor], torch.Tensor]
# Numbers of one block of Q8_0, which share a scale.
_BLOCK = 32


@contextmanager
def moved_weights(model: nn.Module, steps: Steps, generator: torch.Generator) -> Iterator[None]:
    """Move the weights of a model, not vectors, within half a step, and put them back at the end.

    Args:
        model: Changed in place.
        steps: Of the format.
        generator: Decides the moves.
    """
    before: dict[nn.Parameter, torch.Tensor] = {}
    try:
        with torch.no_grad():
            for module in model.modules():
                for weight in module.parameters(recurse=False):
                    if weight.dim() < 2 or weight in before or not weight.is_floating_point():
                        continue
                    before[weight] = weight.detach().clone()
                    values = weight.detach().float().cpu()
                    moves = torch.rand(values.shape, generator=generator) - 0.5
                    weight.copy_(values + moves * steps(module, values))
        yield
    finally:
        with torch.no_grad():
            for weight, values in before.items():
                weight.copy_(values)


@contextmanager
def moved_inputs(
    model: nn.Module, generator: torch.Generator, *, levels: int = 255
) -> Iterator[None]:
    """Move what linear layers are given, as rounding each input as a whole to 8 bits does.

    The range of an input, which always includes zero, is cut into `levels` steps.
    """

    def move(_: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        values = args[0]
        width = values.max().clamp(min=0) - values.min().clamp(max=0)
        moves = torch.rand(values.shape, generator=generator).to(values) - 0.5
        return (values + moves * width / levels, *args[1:])

    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, nn.Linear):
                handle = module.register_forward_pre_hook(move)
                stack.callback(handle.remove)
        yield


def steps_of_floats(bits: int) -> Steps:
    """Return the steps of a floating-point format with so many bits after the leading one."""

    def steps(_: nn.Module, values: torch.Tensor) -> torch.Tensor:
        return torch.ldexp(torch.ones_like(values), torch.frexp(values).exponent - 1 - bits)

    return steps


def steps_of_blocks(_: nn.Module, values: torch.Tensor) -> torch.Tensor:
    """Return the steps of Q8_0: the largest of 32 neighbours is 127 steps, its scale a float16."""
    blocks = values.reshape(-1, _BLOCK)
    largest = blocks.abs().amax(-1, keepdim=True)
    # The scale is rounded to 11 bits, which moves 127 steps of it by less than a tenth of one.
    return (largest / 127 * 1.1).expand_as(blocks).reshape(values.shape)


def steps_of_integers(levels: int) -> Steps:
    """Return the steps of signed integers: one scale for each row of a linear layer, else one."""

    def steps(module: nn.Module, values: torch.Tensor) -> torch.Tensor:
        size = values.abs()
        is_linear = isinstance(module, nn.Linear)
        return (size.amax(-1, keepdim=True) if is_linear else size.max()) / levels

    return steps

"""Batch norms, which a model of images may have: they keep the statistics that they came with."""

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def keep_statistics(model: object) -> None:
    """Put every batch norm of a model into evaluation mode, in place.

    It then computes with its stored mean and variance, which stay as they are. With those of a
    batch, what is computed of a row would depend on the other rows, and so on the number of rows
    that are run together; and those of the frozen base would change in training, without being
    part of what is saved. Scale and shift of a norm are trained where its module is. One in a new
    head starts with the mean 0 and the variance 1, and so only scales and shifts.
    """
    if not isinstance(model, nn.Module):
        return
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.eval()

"""Updates against the layers of a model."""

import pytest
import torch
from torch import nn

from lora_cli.artifacts.foreign_file import Base
from lora_cli.artifacts.foreign_shapes import base_layers, check_layers
from lora_cli.errors import UserError
from lora_cli.lora.factors import Factors


def base() -> Base:
    with torch.device("meta"):
        model = nn.ModuleDict(
            {
                "linear": nn.Linear(3, 5),
                "table": nn.Embedding(7, 4),
                "conv": nn.Conv2d(4, 6, 3, groups=2),
            }
        )
    return Base(name="BASE", layers=base_layers(model), settings={})


def factors(a: tuple[int, ...], b: tuple[int, ...]) -> Factors:
    return Factors(A=torch.ones(a), B=torch.ones(b), scale=1.0)


FITTING = {
    "linear": factors((2, 3), (5, 2)),
    "table": factors((2, 7), (4, 2)),
    "conv": factors((2, 4, 3, 3), (6, 1, 1, 1)),
}


def test_what_fits_is_let_through() -> None:
    check_layers(FITTING, base(), where="")
    check_layers(FITTING, None, where="")


@pytest.mark.parametrize(
    ("layers", "problem", "text"),
    [
        ({"lineal": FITTING["linear"]}, "unknown-layer", "no layer lineal"),
        ({"linear": factors((2, 4), (5, 2))}, "shape", "instead of (r, 3) and (5, r)"),
        ({"linear": factors((2, 3), (6, 2))}, "shape", "linear: (2, 3) and (6, 2)"),
        ({"table": FITTING["linear"]}, "shape", "(r, 7) and (4, r)"),
        ({"conv": factors((2, 4, 3, 3), (6, 2, 1, 1))}, "shape", "conv: "),
        ({"linear": factors((2, 3), (5, 4))}, "shape", "of one rank"),
        ({"linear": factors((0, 3), (5, 0))}, "shape", "of one rank"),
        ({"linear": factors((2, 3, 1), (5, 2))}, "shape", "of one rank"),
    ],
)
def test_what_does_not_is_named(layers: dict[str, Factors], problem: str, text: str) -> None:
    with pytest.raises(UserError) as caught:
        check_layers(layers, base(), where="")
    (found,) = caught.value.problems
    assert found.id == f"convert.{problem}"
    assert text in found.message

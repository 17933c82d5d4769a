"""The settings of `lora-cli export`."""

from collections.abc import Callable
from typing import Any

import pytest

from lora_cli.errors import UserError


def test_formats_are_those_of_the_table(compose_all: Callable[..., list[Any]]) -> None:
    (composed,) = compose_all("export", "runs/a", "format=onnx-int8")
    assert composed.config.format_ == "onnx-int8"
    with pytest.raises(UserError) as caught:
        compose_all("export", "runs/a", "format=onxx")
    assert "torch-export" in str(caught.value.problems[0].allowed)

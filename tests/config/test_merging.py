"""Settings of `lora-cli merge` that concern how it writes and compares."""

from collections.abc import Callable
from typing import Any

import pytest

from lora_cli.config.merging import MergeConfig, check_rows_to_verify, check_shard_size
from lora_cli.errors import UserError


@pytest.mark.parametrize(("text", "fits"), [("5GB", True), (None, True), ("5", False)])
def test_sizes_of_files(text: str | None, fits: bool) -> None:
    problems = list(check_shard_size(MergeConfig(max_shard_size=text), ()))
    assert [problem.key for problem in problems] == ([] if fits else ["max_shard_size"])


def test_outputs_need_rows() -> None:
    (problem,) = check_rows_to_verify(MergeConfig(verify="logits", check_rows=0), ())
    assert problem.fix == "verify=layers, which needs no rows"
    for config in (MergeConfig(check_rows=0), MergeConfig(verify="logits")):
        assert not list(check_rows_to_verify(config, ()))


def test_what_is_for_models_is_refused_for_adapters(
    compose_all: Callable[..., list[Any]],
) -> None:
    both = ("merge", "adapters=[a,b]", "output=x")
    assert compose_all(*both, "dtype=float16", "verify=none", "sync=false")
    for setting in ("dtype=float16", "verify=none", "sync=false", "max_shard_size=1GB"):
        with pytest.raises(UserError):
            compose_all(*both, "into=adapter", setting)

"""Two processes on the CPU against one; `pair.py` is what both of them run."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lora_cli.training.group import ALONE, join_group


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port: int = server.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def pair(
    tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Callable[..., Path]
) -> list[Any]:
    """What two processes have seen, by rank."""
    out = tmp_path_factory.mktemp("pair")
    data = out / "toy"
    data.mkdir()
    for split, count in (("train", 64), ("validation", 16)):
        rows = [{"text": "good film " * (i % 5 + 1) + str(i), "label": i % 2} for i in range(count)]
        lines = [json.dumps({**row, "label": "ab"[row["label"]]}) for row in rows]
        (data / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    command = [sys.executable, str(Path(__file__).with_name("pair.py")), str(out)]
    processes = [
        subprocess.Popen(
            [*command, str(tiny_model_dir()), str(data)],
            env={**os.environ, **address, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]
    for process in processes:
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err.decode()
    return [json.loads((out / f"{rank}.json").read_bytes()) for rank in range(2)]


def test_one_process_talks_to_itself() -> None:
    assert join_group(1.0) is ALONE
    assert ALONE.first(lambda: 3) == 3
    assert ALONE.gather_tensors({"a": torch.ones(1)}) == [{"a": torch.ones(1)}]
    parameter = nn.Parameter(torch.zeros(1))
    ALONE.add_gradients([parameter])
    assert parameter.grad is None
    with pytest.raises(ValueError, match="as it is"), ALONE.together():
        raise ValueError("as it is")


@pytest.mark.slow
def test_values_travel(pair: list[Any]) -> None:
    for seen in (rank["talk"] for rank in pair):
        assert seen["sum"] == [3.0, 1.0]
        assert seen["any"] == [True, False]
        assert seen["first"] == {"rank": 0, "text": "ä", "none": None}
        assert seen["shared"] == seen["parameter"][:2] == [0.0, 0.0]
        assert seen["of_none"] == {}
        assert seen["gathered"] == [{"r0": [0]}, {"r1": [0, 1]}]
        assert seen["after"] == 2


@pytest.mark.slow
def test_errors_are_everybodys(pair: list[Any]) -> None:
    for seen in (rank["talk"] for rank in pair):
        assert seen["user"] == ["UserError", 2, ["`x` must be y, but is z."]]
    first, second = (rank["talk"] for rank in pair)
    assert first["os"][0] == "FileNotFoundError"
    assert second["os"][:2] == ["StorageError", 74]
    assert second["together"] == ["ValueError", "only here"]
    assert first["together"][0] == "LoraCliError"
    assert "Rank 1" in first["together"][1]
    for rank in pair:
        assert rank["failure"] == ["x.bad-row", 1]


@pytest.mark.slow
def test_an_error_between_two_exchanges_is_everybodys(pair: list[Any]) -> None:
    first, second = (rank["talk"]["met"] for rank in pair)
    assert first == [
        "LoraCliError: Rank 1 must go on, but failed: ValueError: in the middle.",
    ]
    assert second == ["ValueError: in the middle", "ValueError: alone"]


@pytest.mark.slow
def test_gradients_are_added_where_there_are_any(pair: list[Any]) -> None:
    for rank in pair:
        assert rank["gradients"] == [[3.0, 6.0], [1.0, 1.0, 5.0], None]


@pytest.mark.slow
def test_evaluation_is_that_of_one_process(pair: list[Any]) -> None:
    for rank in pair:
        expected = {"wrong": [], "cells": 17 * 5, "once": True, "stopped": [True]}
        assert rank["evaluation"] == expected


@pytest.mark.slow
def test_gradients_of_ragged_windows_are_those_of_one_process(pair: list[Any]) -> None:
    for rank in pair:
        assert len(rank["windows"]) == 10
        for name, (difference, loss, count) in rank["windows"].items():
            assert difference < 1e-6, name
            assert loss < 1e-5, name
            assert count == int(name.partition("/")[0])


@pytest.mark.slow
def test_training_is_that_of_one_process(pair: list[Any]) -> None:
    first, second = (rank["training"] for rank in pair)
    losses = first["losses"]
    assert len(losses["both"]) == 7
    assert losses["both"] == pytest.approx(losses["alone"], rel=1e-5)
    assert losses == second["losses"]
    # Otherwise the masks of both processes would be the same.
    assert losses["dropout"] != pytest.approx(losses["both"], rel=1e-3)
    assert first["equal"]
    assert first["steps"] == 3
    assert first["resumed"]
    assert second["resumed"]

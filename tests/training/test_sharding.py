"""A base that is spread over two processes against a whole one; `sharded_pair.py` runs in both."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from lora_cli.errors import UserError
from lora_cli.lora.inject import freeze_base, inject_lora
from lora_cli.lora.settings import LoraSettings
from lora_cli.training.group import ALONE, Group
from lora_cli.training.sharding import (
    Sharding,
    check_shardable,
    is_sharded,
    local_share,
    shard_model,
    sharding_of_accelerate,
    shared_passes,
    spreadable_bytes,
    without_trace,
)


@pytest.fixture(scope="module")
def pair(
    tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Callable[..., Path]
) -> list[Any]:
    """What two processes have seen, by rank."""
    out = tmp_path_factory.mktemp("sharded")
    data = out / "toy"
    data.mkdir()
    for split, count in (("train", 64), ("validation", 16)):
        texts = [f"{'good film ' * (i % 5 + 1)}{i}" for i in range(count)]
        rows = [{"text": text, "label": "ab"[i % 2]} for i, text in enumerate(texts)]
        (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    script = Path(__file__).with_name("sharded_pair.py")
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(out), str(tiny_model_dir()), str(data)],
            env={**os.environ, **address, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]
    for process in processes:
        _, err = process.communicate(timeout=180)
        assert process.returncode == 0, err.decode()
    return [json.loads((out / f"{rank}.json").read_bytes()) for rank in range(2)]


@pytest.mark.slow
def test_ragged_windows_give_the_same_bits(pair: list[Any]) -> None:
    assert [seen["windows"] for seen in pair] == [[], []]


@pytest.mark.slow
def test_ragged_evaluations_give_the_same_bits(pair: list[Any]) -> None:
    assert [seen["evaluations"] for seen in pair] == [[], []]


@pytest.mark.slow
def test_every_method_trains_and_merges_to_the_same_bits(pair: list[Any]) -> None:
    for seen in pair:
        assert len(seen["methods"]) == 11
        wrong = {name: found for name, found in seen["methods"].items() if not all(found)}
        assert wrong == {}
        assert seen["rounded"]


@pytest.mark.slow
def test_tied_weights_encoders_and_generation(pair: list[Any]) -> None:
    for seen in pair:
        assert seen["families"] == {"gpt2": [True] * 5, "t5": [True] * 5}


@pytest.mark.slow
def test_a_checkpoint_does_not_depend_on_it(pair: list[Any]) -> None:
    assert [seen["resumed"] for seen in pair] == [[True], [True]]


@pytest.mark.slow
def test_each_process_keeps_half(pair: list[Any]) -> None:
    for seen in (rank["memory"] for rank in pair):
        assert seen["all"] == seen["whole"]
        assert seen["here"] == pytest.approx(seen["whole"] / 2, rel=0.01)
        assert (seen["blocks"], seen["gathered afterwards"]) == (2, 0)
        assert seen["trained"]


@pytest.mark.slow
def test_an_error_in_a_block_is_everybodys(pair: list[Any]) -> None:
    first, second = (rank["failure"] for rank in pair)
    assert set(first) == {"forward", "backward", "loss"}
    for place in first:
        assert second[place] == ["ValueError", "only here"]
        assert first[place][0] == "LoraCliError"
        assert "Rank 1 must go on, but failed: ValueError: only here" in first[place][1]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Sharding | None]]:
    """Return what `accelerate launch` was asked for, given what it puts into the environment."""
    # As accelerate 1.15 does for `--use_fsdp --fsdp_version 2` and nothing more.
    usual = {
        "VERSION": "2",
        "SHARDING_STRATEGY": "FULL_SHARD",
        "RESHARD_AFTER_FORWARD": "true",
        "OFFLOAD_PARAMS": "false",
        "MIN_NUM_PARAMS": "100000000",
        "FORWARD_PREFETCH": "false",
        "USE_ORIG_PARAMS": "true",
        "CPU_RAM_EFFICIENT_LOADING": "true",
        "SYNC_MODULE_STATES": "true",
        "ACTIVATION_CHECKPOINTING": "false",
        "ACTIVATION_CHECKPOINTING_OFFLOAD": "false",
    }

    def ask(**changed: str) -> Sharding | None:
        sharding_of_accelerate.cache_clear()
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
        for name, value in {**usual, **changed}.items():
            monkeypatch.setenv(f"FSDP_{name}", value)
        return sharding_of_accelerate()

    yield ask
    sharding_of_accelerate.cache_clear()


def test_the_settings_of_accelerate_are_taken(asked: Callable[..., Sharding | None]) -> None:
    assert asked() == Sharding()
    # Neither transformers nor Accelerate act upon it any more, and asking again gives the same.
    assert os.environ["ACCELERATE_USE_FSDP"] == "false"
    assert sharding_of_accelerate() == Sharding()
    assert asked(RESHARD_AFTER_FORWARD="false", AUTO_WRAP_POLICY="TRANSFORMER_BASED_WRAP") == (
        Sharding(reshard=False)
    )
    assert asked(TRANSFORMER_CLS_TO_WRAP="BertLayer, Other") == Sharding(
        blocks=("BertLayer", "Other")
    )


def test_nothing_is_spread_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    sharding_of_accelerate.cache_clear()
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "false")
    assert sharding_of_accelerate() is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("VERSION", "1"),
        ("OFFLOAD_PARAMS", "true"),
        ("ACTIVATION_CHECKPOINTING", "true"),
        ("AUTO_WRAP_POLICY", "SIZE_BASED_WRAP"),
        ("IGNORED_MODULES", "head"),
        ("FORWARD_PREFETCH", "true"),
        ("BACKWARD_PREFETCH", "BACKWARD_POST"),
    ],
)
def test_what_is_not_done_is_refused(
    asked: Callable[..., Sharding | None], name: str, value: str
) -> None:
    with pytest.raises(UserError, match=f"`--fsdp_{name.lower()}`.*but is {value}") as caught:
        asked(**{name: value})
    assert [problem.id for problem in caught.value.problems] == ["distributed.unsupported"]
    # The next job of a sweep must not go on without it.
    with pytest.raises(UserError):
        sharding_of_accelerate()


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.query(x) * 2
        return result


class _Model(nn.Module):
    def __init__(self, **config: Any) -> None:
        super().__init__()
        self.config = SimpleNamespace(**config)
        self.table = nn.Linear(4, 8, bias=False)
        self.layers = nn.ModuleList([_Block(), _Block()])
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.requires_grad_(False)


def test_what_is_spread_is_the_frozen_base() -> None:
    model = _Model()
    whole = 4 * (32 + 2 * 20)
    assert spreadable_bytes(model, Sharding()) == whole
    # Adapters are not, whether trained or frozen, nor what is trained besides.
    inject_lora(model, ("layers.0.query",), LoraSettings(r=2, alpha=2.0, variant="lora_fa"))
    freeze_base(model, ())
    assert spreadable_bytes(model, Sharding()) == whole
    model.table.requires_grad_(True)
    assert spreadable_bytes(model, Sharding()) == whole - 4 * 32


def test_a_weight_of_two_blocks_stays_whole() -> None:
    model = _Model()
    before = spreadable_bytes(model, Sharding())
    first, second = (block.query for block in model.layers)
    second.weight = first.weight
    assert spreadable_bytes(model, Sharding()) == before - 2 * 4 * 16
    # As one unit they can let go of it.
    assert spreadable_bytes(model, Sharding(blocks=("_Model",))) == before - 4 * 16


@pytest.mark.parametrize(
    ("model", "sharding", "words"),
    [
        (_Model(layerdrop=0.1), Sharding(), "leaves out blocks at random"),
        (_Model().requires_grad_(True), Sharding(), "every weight of the base is trained"),
        (_Model(), Sharding(blocks=("BertLayer",)), "but BertLayer is none"),
    ],
)
def test_a_base_that_cannot_be_spread(model: Any, sharding: Sharding, words: str) -> None:
    with pytest.raises(UserError, match=words):
        check_shardable(model, sharding)
    check_shardable(_Model(layerdrop=0.0), Sharding(blocks=("_Block",)))


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[Group]:
    """A group of one process that torch knows of as well."""
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield Group(rank=0, size=1)
    dist.destroy_process_group()


@pytest.mark.parametrize("reshard", [True, False])
def test_a_block_is_let_go_of(alone: Group, reshard: bool) -> None:
    model: Any = _Model()
    inject_lora(model, ("layers.0.query",), LoraSettings(r=2, alpha=2.0))
    freeze_base(model, ())
    nn.init.normal_(model.layers[0].query.lora_B.weight)
    x = torch.randn(3, 4)
    trained = model.layers[0].query.lora_A.weight
    model.layers[0](x).sum().backward()
    expected, gradient = model.layers[0](x).detach(), trained.grad.clone()
    trained.grad = None
    shard_model(model, Sharding(reshard=reshard), group=alone, device=torch.device("cpu"))
    assert all(is_sharded(module) for module in (model, *model.layers))
    assert not is_sharded(model.layers[0].query)
    # Its own tensors are plain ones still, and the very same.
    assert model.layers[0].query.lora_A.weight is trained
    assert not hasattr(trained, "device_mesh")
    assert not hasattr(model.scale, "device_mesh")
    with torch.inference_mode():
        assert torch.equal(model.layers[0](x), expected)
    found = model.layers[0](x)
    assert torch.equal(found, expected)
    weight = model.layers[0].query.base_layer.weight
    assert hasattr(weight, "device_mesh") == reshard
    found.sum().backward()
    assert torch.equal(trained.grad, gradient)
    assert hasattr(model.layers[0].query.base_layer.weight, "device_mesh")


def test_blocks_meet_before_they_are_gathered(
    alone: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    for name in ("meet", "begin_exchange", "end_exchange"):
        monkeypatch.setattr(alone, name, lambda name=name: seen.append(name))
    model: Any = _Model()
    model.generate = lambda: seen.append("generate")
    shard_model(model, Sharding(), group=alone, device=torch.device("cpu"))
    once = ["meet", "begin_exchange", "end_exchange"]
    output = model.layers[1](torch.randn(2, 4, requires_grad=True))
    assert seen == once
    output.sum().backward()
    assert seen == once * 2
    model.generate()
    assert seen == [*once * 3, "generate"]


def test_passes_for_the_sake_of_others() -> None:
    spread: Any = SimpleNamespace(set_reshard_after_forward=None)
    assert is_sharded(spread)
    for rows in range(1, 12):
        for size in (1, 2, 4):
            for world in (1, 2, 3):
                counts = set()
                for rank in range(world):
                    own = len(range(rows)[rank::world])
                    group = Group(rank=rank, size=world)
                    more = list(shared_passes(spread, range(rows), size, group=group))
                    assert all(list(found) == [0] for found in more)
                    counts.add(-(-own // size) + len(more))
                assert len(counts) == 1, (rows, size, world)
    assert list(shared_passes(_Model(), range(1), 1, group=Group(rank=1, size=2))) == []
    assert list(shared_passes(spread, range(3), 1, group=ALONE)) == []


def test_a_pass_without_trace() -> None:
    first, second = (nn.Parameter(torch.ones(2)) for _ in range(2))
    first.grad = torch.full((2,), 3.0)
    with without_trace([first, second]):
        (first.sum() + second.sum()).backward()
        assert second.grad is not None
    assert (first.grad.tolist(), second.grad) == ([3.0, 3.0], None)


def test_a_parameter_that_is_not_spread_is_here() -> None:
    parameter = nn.Parameter(torch.arange(3.0))
    assert torch.equal(local_share(parameter), torch.arange(3.0))

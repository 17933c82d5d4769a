import pytest

from lora_cli.config.distributed import (
    DistributedConfig,
    check_distributed,
    check_sharding,
    check_shares,
)
from lora_cli.config.sections import TrainerConfig


def problems(config: DistributedConfig, *user: str, names_run: bool = True) -> list[str | None]:
    found = check_distributed(config, {f"distributed.{x}" for x in user}, names_run=names_run)
    return [problem.key for problem in found]


def test_one_process_needs_nothing() -> None:
    assert problems(DistributedConfig(), names_run=False) == []
    assert problems(DistributedConfig(num_processes=2, max_restarts=1), "max_restarts") == []


def test_several_machines_need_a_place_and_a_name() -> None:
    assert problems(DistributedConfig(num_nodes=2), names_run=False) == [
        "distributed.rendezvous",
        "run.dir",
    ]
    assert problems(DistributedConfig(num_nodes=2, rendezvous="a:1"), "rendezvous") == []


@pytest.mark.parametrize("place", ["host", "host:", ":29400", "host:x", "host:70000"])
def test_a_place_is_host_and_port(place: str) -> None:
    config = DistributedConfig(num_nodes=2, rendezvous=place)
    assert problems(config) == ["distributed.rendezvous"]


@pytest.mark.parametrize(
    ("name", "value"), [("rendezvous", "a:1"), ("rendezvous_id", "b"), ("max_restarts", 1)]
)
def test_settings_of_several_are_refused_for_one(name: str, value: object) -> None:
    config = DistributedConfig(**{name: value})  # type: ignore[arg-type]  # of either type
    assert problems(config, name) == [f"distributed.{name}"]


@pytest.mark.parametrize(
    ("batch", "micro", "processes", "fix"),
    [
        (32, None, 1, None),
        (15, 4, 1, None),
        (32, None, 2, None),
        (32, 8, 4, None),
        (15, None, 2, "trainer.global_batch_size=16"),
        (32, 8, 3, "trainer.global_batch_size=48"),
    ],
)
def test_shares_are_equal(batch: int, micro: int | None, processes: int, fix: str | None) -> None:
    trainer = TrainerConfig(global_batch_size=batch, micro_batch_size=micro)
    assert [p.fix for p in check_shares(trainer, processes)] == ([fix] if fix else [])


def test_the_world_is_all_machines() -> None:
    assert DistributedConfig(num_processes=4, num_nodes=2).world_size == 8


@pytest.mark.parametrize(
    ("strategy", "quantization", "auto", "count"),
    [
        ("lora", "none", False, 0),
        ("bitfit", "none", False, 0),
        ("full", "none", False, 1),
        ("lora_then_full", "nf4", False, 2),
        ("full", "int8", True, 3),
    ],
)
def test_what_a_base_that_is_spread_does_not_go_with(
    strategy: str, quantization: str, auto: bool, count: int
) -> None:
    trainer = TrainerConfig(auto_micro_batch=auto)
    found = list(check_sharding(strategy=strategy, quantization=quantization, trainer=trainer))
    assert [problem.key for problem in found] == ["distributed.shard_base"] * count

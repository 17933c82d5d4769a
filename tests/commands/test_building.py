from pathlib import Path
from types import SimpleNamespace
from typing import Any

from lora_cli.commands.building import base_record, build_plan
from lora_cli.config.commands import TrainConfig
from lora_cli.models.sources import ModelSource


def test_a_second_phase_has_another_order() -> None:
    prepared: Any = SimpleNamespace(train=[{}], validation=[], saved=("pooler", "classifier"))
    config = TrainConfig(seed=5)
    first, second = (build_plan(prepared, config, is_second=x) for x in (False, True))
    assert (first.seed, second.seed) == (5, 6)
    # Nobody has asked for these modules by name.
    assert first.may_be_unused == ("pooler", "classifier")
    assert first.optimizer is config.optimizer


def test_a_base_is_known_by_its_hash(tmp_path: Path) -> None:
    source = ModelSource(tmp_path, "bert", "main", "ab", settings={"config.json": "cd"})
    prepared: Any = SimpleNamespace(source=source, start=None)
    hashes = {"sha256": "ab", "settings": {"config.json": "cd"}}
    expected = {"name": "bert", "revision": "main", **hashes}
    assert base_record(prepared, tmp_path) == expected
    prepared.start = SimpleNamespace(is_merged=False)
    assert base_record(prepared, tmp_path) == expected

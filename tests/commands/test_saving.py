"""What a run writes of what it has trained; the files are tested beside their formats."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_cli.artifacts.peft_format import PeftAdapter
from lora_cli.artifacts.tuned import Tuned
from lora_cli.commands.opening import open_adapter
from lora_cli.commands.preparing import Prepared, prepare
from lora_cli.commands.saving import (
    live_state,
    merge_trained,
    portable_config,
    trained_adapter,
    unnamed,
)
from lora_cli.config.adapters import LoraConfig
from lora_cli.config.commands import TrainConfig
from lora_cli.config.schema import to_plain
from lora_cli.config.strategies import HeadStrategyConfig, PrefixStrategyConfig
from lora_cli.lora.layer import AdapterLayer
from lora_cli.lora.state import adapter_state

BASE = {"name": "m", "revision": None, "sha256": "0" * 64}


class Quiet:
    def note(self, text: str) -> None: ...

    def table(self, *_: Any, **__: Any) -> None: ...

    def track(self, label: str, items: Any) -> Any:
        return items


@pytest.fixture(scope="module")
def config(tiny_run: Any) -> TrainConfig:
    return open_adapter(str(tiny_run.path), base=None).config


def prepared_for(config: TrainConfig) -> Prepared:
    display: Any = Quiet()
    return prepare(config, display)


@pytest.mark.parametrize("init", ["kaiming", "pissa"])
def test_low_rank_updates_take_the_form_of_peft_and_come_back(
    config: TrainConfig, init: Any
) -> None:
    changed = replace(config, lora=replace(config.lora, init=init))
    prepared = prepared_for(changed)
    tensors = adapter_state(prepared.model, prepared.saved)
    adapter = trained_adapter(prepared, changed, tensors, base=BASE)
    assert isinstance(adapter, PeftAdapter)
    assert adapter.settings.r == (8 if init == "pissa" else 4)
    assert adapter.base_name == config.model.path
    again = live_state(prepared, adapter)
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("strategy", [HeadStrategyConfig(), PrefixStrategyConfig(num_tokens=3)])
def test_anything_else_is_kept_as_it_is(config: TrainConfig, strategy: Any) -> None:
    changed = replace(config, strategy=strategy)
    prepared = prepared_for(changed)
    tensors = adapter_state(prepared.model, prepared.saved)
    adapter = trained_adapter(prepared, changed, tensors, base=BASE)
    assert isinstance(adapter, Tuned)
    assert (adapter.prefix is not None) == (strategy.name == "prefix")
    assert adapter.saved_modules == ("bert.pooler", "classifier")
    assert live_state(prepared, adapter) == tensors


def test_an_adapter_of_a_merged_base_names_that(config: TrainConfig) -> None:
    prepared = prepared_for(config)
    base = {**BASE, "name": "/runs/b/base", "folder": "base"}
    changed = replace(config, model=replace(config.model, hub_id="org/first", revision="main"))
    adapter = trained_adapter(prepared, changed, {}, base=base)
    assert (adapter.base_name, adapter.revision) == ("/runs/b/base", None)
    adapter = trained_adapter(prepared, changed, {}, base=BASE)
    assert (adapter.base_name, adapter.revision) == ("org/first", "main")


def test_merging_leaves_no_adapter(config: TrainConfig) -> None:
    prepared = prepared_for(config)
    merge_trained(prepared)
    assert not any(isinstance(module, AdapterLayer) for module in prepared.model.modules())
    head = prepared_for(replace(config, strategy=HeadStrategyConfig()))
    before = {name: value.clone() for name, value in head.model.named_parameters()}
    merge_trained(head)
    assert all(torch.equal(v, before[n]) for n, v in head.model.named_parameters())


def test_places_of_this_machine_are_left_out_of_what_is_shared() -> None:
    config = TrainConfig(adapter="/home/me/runs/a", lora=LoraConfig(r=3))
    plain = to_plain(config)
    plain["run"] = {"dir": "/home/me/runs/b", "name": None}
    plain["task"]["data"]["path"] = "/home/me/rows.csv"
    shared = portable_config(plain)
    assert shared["adapter"] is None
    assert shared["run"] == {"dir": None, "name": None}
    assert shared["task"]["data"]["path"] is None
    assert shared["lora"]["r"] == 3
    assert plain["task"]["data"]["path"] == "/home/me/rows.csv"
    plain["task"]["data"]["path"] = "nyu-mll/glue"
    assert portable_config(plain)["task"]["data"]["path"] == "nyu-mll/glue"


def test_modules_that_nobody_named() -> None:
    saved = ("bert.pooler", "classifier", "bert.embeddings")
    assert unnamed(saved, ("embeddings",)) == ("bert.pooler", "classifier")
    assert unnamed(saved, ()) == saved


def test_no_secret_is_written_anywhere(
    tiny_run: Any, run_cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = "hf_" + "Ab1" * 11
    settings = [*tiny_run.settings, "trainer.max_steps=2", "tracker=csv", f"tracking.name={secret}"]
    settings.remove("trainer.max_steps=4")
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "lora_cli", "train", *settings])
    done = run_cli("train", *settings, "run.dir=a", cwd=tmp_path)
    assert done.code == 0, done.err
    files = [path for path in (tmp_path / "a").rglob("*") if path.is_file()]
    assert len(files) > 10
    assert [path for path in files if secret.encode() in path.read_bytes()] == []
    recipe, environment = (
        (tmp_path / "a" / name).read_text() for name in ("recipe.yaml", "environment.json")
    )
    assert recipe.startswith("# [redacted] stands for")
    assert "tracking.name=[redacted]" in environment
    # It decides nothing, so the run goes on from either.
    (tmp_path / "a" / "result.json").unlink()
    for name in (secret, "other"):
        more = ("a/recipe.yaml", "run.dir=a", "--resume", f"tracking.name={name}")
        done = run_cli("train", *more, cwd=tmp_path)
        assert done.code == 0, done.err


def test_a_recipe_without_secrets_has_no_note(tiny_run: Any) -> None:
    assert "[redacted]" not in (tiny_run.path / "recipe.yaml").read_text()

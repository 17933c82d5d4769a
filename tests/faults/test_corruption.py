"""Suite 8: every artifact damaged in every way; nothing damaged may pass for sound."""

import contextlib
import json
import logging
import random
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_cli.artifacts.adapter import load_adapter
from lora_cli.artifacts.checkpoint import list_checkpoints, load_latest_checkpoint
from lora_cli.artifacts.commit import MANIFEST
from lora_cli.commands.opening import open_adapter
from lora_cli.errors import UserError
from lora_cli.models.sources import resolve_model

sys.path.insert(0, str(Path(__file__).parent))
from tally import Tally

Damage = Callable[[Path], None]
FLIPS = 32


def edited(change: Callable[[bytes], bytes]) -> Damage:
    def damage(path: Path) -> None:
        path.write_bytes(change(path.read_bytes()))

    return damage


def flipped(number: int) -> Damage:
    def change(content: bytes) -> bytes:
        draw = random.Random(number)
        damaged = bytearray(content)
        damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
        return bytes(damaged)

    return edited(change)


def folder_instead(path: Path) -> None:
    path.unlink()
    path.mkdir()


def link_to_nowhere(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.with_name("nowhere"))


DAMAGES: dict[str, Damage] = {
    "empty": edited(lambda _: b""),
    "one byte": edited(lambda content: content[:1]),
    "half": edited(lambda content: content[: len(content) // 2]),
    # The end of the last line says nothing.
    "a byte less": edited(lambda content: content.removesuffix(b"\n")[:-1]),
    "a byte more": edited(lambda content: content + b"\0"),
    "zeros": edited(lambda content: bytes(len(content))),
    "folder instead": folder_instead,
    "link to nowhere": link_to_nowhere,
    "missing": Path.unlink,
    **{f"bit flip {number}": flipped(number) for number in range(FLIPS)},
}


def damages(*, stride: int) -> Iterator[tuple[str, Damage]]:
    yield from list(DAMAGES.items())[::stride]


def bits(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(folder.iterdir()))


@pytest.fixture
def messages(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(logging.getLogger("lora_cli"), "propagate", True)
    return caplog


@pytest.mark.parametrize("stride", [pytest.param(1, marks=pytest.mark.faults), 6])
@pytest.mark.parametrize(
    "name", ["adapter.safetensors", "optimizer.safetensors", "progress.json", MANIFEST]
)
def test_a_damaged_checkpoint(
    tiny_run: Any, tmp_path: Path, messages: Any, name: str, stride: int
) -> None:
    tally = Tally(f"8 damaged files: checkpoint, {name}")
    whole = tiny_run.path / "checkpoints"
    newest = max(list_checkpoints(whole))
    before = sorted(list_checkpoints(whole))[-2]
    facts = json.loads((whole / f"step-{newest:08d}" / MANIFEST).read_bytes())
    for kind, damage in [*damages(stride=stride), ("that of another step", None)]:
        folder = tmp_path / "checkpoints"
        shutil.copytree(whole, folder)
        path = folder / f"step-{newest:08d}" / name
        if damage is None:
            shutil.copy(folder / f"step-{before:08d}" / name, path)
        else:
            damage(path)
        messages.clear()
        loaded = load_latest_checkpoint(folder, facts=facts)
        tally.trials += 1
        tally.undetected += loaded is None or loaded.progress.step != before
        assert loaded is not None
        assert loaded.progress.step == before, (name, kind)
        assert len(messages.messages) == 1
        found = name if damage is not None else f"step-{newest:08d} is damaged"
        assert found in messages.text, (name, kind, messages.text)
        (aside,) = folder.glob(f".corrupt-step-{newest:08d}-*")
        assert aside.is_dir()
        shutil.rmtree(folder)
    tally.check()


@pytest.mark.parametrize("stride", [pytest.param(1, marks=pytest.mark.faults), 4])
@pytest.mark.parametrize(
    "name", ["adapter_model.safetensors", "adapter_config.json", "lora_cli.json"]
)
def test_a_damaged_adapter(tiny_run: Any, tmp_path: Path, name: str, stride: int) -> None:
    """The head is in the file of the adapter."""
    tally = Tally(f"8 damaged files: adapter, {name}")
    for kind, damage in damages(stride=stride):
        folder = tmp_path / "adapter"
        shutil.copytree(tiny_run.path / "adapter", folder)
        damage(folder / name)
        tally.trials += 1
        with pytest.raises(UserError) as caught:
            load_adapter(folder)
        text = f"{caught.value} {caught.value.problems[0].where}"
        assert name in text, (name, kind, text)
        shutil.rmtree(folder)
    tally.check()


@pytest.mark.parametrize("stride", [pytest.param(1, marks=pytest.mark.faults), 8])
def test_damaged_weights_of_the_base(tiny_run: Any, tmp_path: Path, stride: int) -> None:
    tally = Tally("8 damaged files: base, model.safetensors")
    for _kind, damage in damages(stride=stride):
        base = tmp_path / "base"
        shutil.copytree(tiny_run.base, base)
        damage(base / "model.safetensors")
        tally.trials += 1
        with pytest.raises(UserError):
            open_adapter(str(tiny_run.path), base=str(base))
        shutil.rmtree(base)
    tally.check()


@pytest.mark.parametrize("stride", [pytest.param(1, marks=pytest.mark.faults), 8])
def test_a_damaged_index_of_the_base(tiny_run: Any, tmp_path: Path, stride: int) -> None:
    """What remains of it either names the same weights, or is refused."""
    from transformers import AutoModel

    sharded = tmp_path / "sharded"
    shutil.copytree(tiny_run.base, sharded)
    (sharded / "model.safetensors").unlink()
    model = AutoModel.from_pretrained(tiny_run.base, add_pooling_layer=False)
    model.save_pretrained(sharded, max_shard_size="40KB")
    index = "model.safetensors.index.json"
    assert (sharded / index).is_file()
    weights = model.state_dict()
    tally = Tally("8 damaged files: base, index of shards")
    for kind, damage in damages(stride=stride):
        base = tmp_path / "base"
        shutil.copytree(sharded, base)
        damage(base / index)
        tally.trials += 1
        with contextlib.suppress(UserError):
            resolve_model(str(base), revision=None)
            # Some names in the index mean nothing to whoever reads the shards.
            loaded = AutoModel.from_pretrained(base, add_pooling_layer=False).state_dict()
            same = all(torch.equal(loaded[name], weights[name]) for name in weights)
            tally.undetected += not same
            assert same, kind
        shutil.rmtree(base)
    tally.check()

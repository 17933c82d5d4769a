"""Writing tensor by tensor: every byte in its place, hashed on the way, in parts of any size."""

import errno
import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_cli.artifacts import merge_stream
from lora_cli.artifacts.merge_plan import Piece, arrange, cast, changed, untouched
from lora_cli.artifacts.merge_stream import write_shards
from lora_cli.artifacts.tensor_files import StoredWeights, read_weights
from lora_cli.lora.updates import LowRank, Replaced, SomeRows

torch.manual_seed(0)
TENSORS = {
    "w": torch.randn(37, 16).bfloat16(),
    "same": torch.randn(50, 3),
    "table": torch.randn(7, 4).bfloat16(),
    "ids": torch.arange(5),
    "one": torch.tensor(2.5),
    "none": torch.zeros(0, 4),
}
A, B = torch.randn(2, 16), torch.randn(37, 2)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    folder.mkdir()
    save_file(TENSORS, folder / "model.safetensors", {"format": "pt"})
    return folder


def pieces_of(weights: StoredWeights) -> list[Piece]:
    stored = weights.tensors
    rows = SomeRows({1: torch.ones(4), 7: torch.zeros(4), 8: torch.full((4,), 2.0)})
    return [
        changed(stored["w"], LowRank(A, B, 0.5)),
        untouched(stored["same"], "renamed"),
        Piece("table", "BF16", (9, 4), stored["table"], rows),
        *(untouched(stored[name]) for name in ("ids", "one", "none")),
        Piece("head", "BF16", (3, 2), None, Replaced(torch.full((3, 2), 0.3))),
        untouched(stored["same"], "same"),
    ]


@pytest.mark.parametrize("elements", [1, 17, 2**19])
def test_every_tensor_is_what_it_should_be(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, elements: int
) -> None:
    monkeypatch.setattr(merge_stream, "_ELEMENTS", elements)
    monkeypatch.setattr(merge_stream, "_COPIED", elements)
    weights, out = read_weights(base), tmp_path / "out"
    out.mkdir()
    complete: list[str] = []
    seen: list[int] = []
    streamed = write_shards(
        arrange(pieces_of(weights), weights, max_bytes=1000),
        weights,
        base,
        out,
        written=lambda path: complete.append(path.name),
        advance=seen.append,
    )
    found = {}
    for path in out.glob("*.safetensors"):
        found |= load_file(path)
        assert hashlib.sha256(path.read_bytes()).hexdigest() == streamed.written[path.name]
    table = torch.cat([TENSORS["table"], torch.zeros(2, 4).bfloat16()])
    table[1], table[8] = 1, 2
    expected = {
        "w": (TENSORS["w"].float() + (B @ A) * 0.5).bfloat16(),
        "renamed": TENSORS["same"],
        "table": table,
        "head": torch.full((3, 2), 0.3).bfloat16(),
        **{name: TENSORS[name] for name in ("ids", "one", "none", "same")},
    }
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
        assert found[name].dtype == tensor.dtype
    content = (base / "model.safetensors").read_bytes()
    assert streamed.base == {"model.safetensors": hashlib.sha256(content).hexdigest()}
    assert sum(seen) == streamed.num_bytes == sum(t.nbytes for t in expected.values())
    assert sorted(complete) == sorted(streamed.written)
    assert (out / "model.safetensors.index.json").is_file()


def test_what_nothing_reads_is_hashed_too(base: Path, tmp_path: Path) -> None:
    weights, out = read_weights(base), tmp_path / "out"
    out.mkdir()
    shards = arrange(cast([untouched(weights.tensors["table"])], torch.float16), weights)
    streamed = write_shards(shards, weights, base, out)
    content = (base / "model.safetensors").read_bytes()
    assert streamed.base["model.safetensors"] == hashlib.sha256(content).hexdigest()
    found = load_file(out / "model.safetensors")
    assert torch.equal(found["table"], TENSORS["table"].half())


def test_a_write_that_fails_is_told(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(output: object, content: memoryview) -> None:
        del output, content
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(merge_stream._Output, "_write", full)
    weights, out = read_weights(base), tmp_path / "out"
    out.mkdir()
    with pytest.raises(OSError, match="no space"):
        write_shards(arrange(pieces_of(weights), weights), weights, base, out)

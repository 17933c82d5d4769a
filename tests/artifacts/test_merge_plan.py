"""Which file each tensor of a merged model goes into, and in what order."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lora_cli.artifacts.merge_plan import Piece, arrange, cast, changed, untouched
from lora_cli.artifacts.tensor_files import StoredWeights, read_weights
from lora_cli.lora.updates import Replaced


@pytest.fixture
def weights(tmp_path: Path) -> StoredWeights:
    save_file(
        {"wide": torch.zeros(4, 2), "a": torch.zeros(6, 2).half(), "b": torch.zeros(2, 2).half()},
        tmp_path / "model.safetensors",
    )
    return read_weights(tmp_path)


def test_the_file_of_the_base_and_what_it_lacks(weights: StoredWeights) -> None:
    new = Piece("head", "F32", (3,), None, Replaced(torch.ones(3)))
    (shard,) = arrange([*map(untouched, weights.tensors.values()), new], weights)
    assert shard.name == shard.metadata == "model.safetensors"
    # Wider numbers first, so that none begins between two of its own width.
    assert [piece.name for piece in shard.pieces] == ["head", "wide", "a", "b"]
    assert [piece.num_bytes for piece in shard.pieces] == [12, 32, 24, 8]


def test_files_of_a_size(weights: StoredWeights) -> None:
    pieces = [untouched(tensor) for tensor in weights.tensors.values()]
    shards = arrange(pieces, weights, max_bytes=33)
    assert [[p.name for p in shard.pieces] for shard in shards] == [["wide"], ["a", "b"]]
    assert [shard.name for shard in shards] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    # One that is larger than a file may be has one of its own.
    assert len(arrange(pieces, weights, max_bytes=1)) == 3
    assert [s.name for s in arrange(pieces, weights, max_bytes=10**6)] == ["model.safetensors"]


def test_another_number_format_and_another_size(weights: StoredWeights) -> None:
    wide = weights.tensors["wide"]
    longer = Piece("wide", "F32", (5, 2), wide, Replaced(torch.ones(5, 2)))
    assert longer.num_bytes == 40
    (half,) = cast([changed(wide, Replaced(torch.ones(4, 2)), "w")], torch.bfloat16)
    assert (half.name, half.kind, half.num_bytes) == ("w", "BF16", 16)
    whole = Piece("ids", "I64", (2,), None)
    assert cast([whole], torch.bfloat16) == [whole]

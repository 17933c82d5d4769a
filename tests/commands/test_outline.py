"""What a model without numbers says of the tensors of its files."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from made_adapter import make_adapter

from lora_cli.artifacts.adapter import find_subject, load_adapter
from lora_cli.artifacts.merge_names import CannotStreamError
from lora_cli.artifacts.merge_plan import Piece
from lora_cli.artifacts.tensor_files import StoredWeights, read_weights
from lora_cli.commands.outline import Outline, outline
from lora_cli.commands.recorded import training_config
from lora_cli.errors import UserError
from lora_cli.lora.settings import LoraSettings
from lora_cli.lora.updates import LowRank, Replaced
from lora_cli.models.sources import locate_model

PLAIN = LoraSettings(r=4, alpha=8)


def lay_out(adapter: Path, base: Path, change: Callable[[Any], Any] = lambda w: w) -> Outline:
    subject = find_subject(str(adapter))
    read, record = load_adapter(subject.adapter)
    config = training_config(record, subject)
    weights: StoredWeights = change(read_weights(base))
    where = subject.adapter
    return outline(locate_model(str(base)), read, record, config, weights, where=where)


def by_name(found: Outline) -> dict[str, Piece]:
    return {piece.name: piece for piece in found.pieces}


def test_a_head_is_new_and_a_body_gets_its_name(tiny_run: Any) -> None:
    found = by_name(lay_out(tiny_run.path, tiny_run.base))
    stored = read_weights(tiny_run.base).tensors
    assert isinstance(found["classifier.weight"].change, Replaced)
    assert found["classifier.weight"].source is None
    query = found["bert.encoder.layer.0.attention.self.query.weight"]
    assert isinstance(query.change, LowRank)
    assert query.source == stored["encoder.layer.0.attention.self.query.weight"]
    assert {p.source.name for p in found.values() if p.source is not None} == set(stored)


def test_what_the_model_does_not_read_is_left_out(tiny_run: Any) -> None:
    def with_stranger(weights: StoredWeights) -> StoredWeights:
        first = next(iter(weights.tensors.values()))
        stranger = replace(first, name="cls.stranger")
        return replace(weights, tensors={**weights.tensors, "cls.stranger": stranger})

    assert set(by_name(lay_out(tiny_run.path, tiny_run.base, with_stranger))) == set(
        by_name(lay_out(tiny_run.path, tiny_run.base))
    )


def test_files_that_lack_a_tensor_are_not_merged(tiny_run: Any) -> None:
    def without(weights: StoredWeights) -> StoredWeights:
        tensors = dict(weights.tensors)
        del tensors["encoder.layer.0.output.dense.bias"]
        return replace(weights, tensors=tensors)

    with pytest.raises((CannotStreamError, UserError)):
        lay_out(tiny_run.path, tiny_run.base, without)


def test_shared_tensors(tiny_language_dir: Callable[..., Path], tmp_path: Path) -> None:
    base = tiny_language_dir("gpt2")
    for targets, names in (
        (["c_attn"], {"transformer.wte.weight"}),
        (["wte"], {"transformer.wte.weight", "lm_head.weight"}),
    ):
        adapter = make_adapter(tmp_path / targets[0], base, PLAIN, targets=targets)
        found = lay_out(adapter, base)
        pieces = {n: p for n, p in by_name(found).items() if "wte" in n or "lm_head" in n}
        assert set(pieces) == names
        assert found.model.config.tie_word_embeddings == (len(names) == 1)
        changed = {name for name, piece in pieces.items() if piece.change is not None}
        assert changed == ({"transformer.wte.weight"} if len(names) == 2 else set())


def test_a_trained_table_stays_shared(
    tiny_language_dir: Callable[..., Path], tmp_path: Path
) -> None:
    base = tiny_language_dir("gpt2")
    adapter = make_adapter(tmp_path / "a", base, PLAIN, targets=["c_attn"], whole=("wte",))
    found = lay_out(adapter, base)
    assert isinstance(by_name(found)["transformer.wte.weight"].change, Replaced)
    assert "lm_head.weight" not in by_name(found)
    assert found.model.config.tie_word_embeddings
    assert all(p.kind == "F32" for p in found.pieces)
    assert {parameter.device for parameter in found.model.parameters()} == {torch.device("meta")}

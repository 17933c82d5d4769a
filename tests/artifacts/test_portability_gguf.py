"""Rules of llama.cpp's converter, against numbers worked out by hand from its source."""

from pathlib import Path

import pytest
import torch
from stranger_adapters import PREFIX, errors, factors, findings, write_adapter


@pytest.mark.parametrize(("r", "alpha", "same"), [(4, 8, "16"), (16, 8, "32"), (2, 1, "1.41421")])
def test_rslora_as_plain_lora(r: int, alpha: int, same: str, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a", factors(r=r), r=r, lora_alpha=alpha, use_rslora=True)
    (found,) = findings(folder, "llama.cpp")
    # alpha / sqrt(r) is what `same` / r is.
    assert alpha / r**0.5 == pytest.approx(float(same) / r, rel=1e-5)
    assert f'"lora_alpha": {same}' in found.fix
    plain = write_adapter(tmp_path / "b", factors(r=r), r=r, lora_alpha=float(same))
    assert errors(plain, "llama.cpp") == set()


def test_rslora_of_several_ranks_has_no_such_alpha(tmp_path: Path) -> None:
    tensors = {**factors(), **factors("model.layers.1.self_attn.q_proj", r=2)}
    folder = write_adapter(
        tmp_path / "a", tensors, use_rslora=True, rank_pattern={"layers.1.self_attn.q_proj": 2}
    )
    (found,) = findings(folder, "llama.cpp")
    assert found.fix.startswith("merge the adapter")


def test_rank_patterns_and_norms_are_taken(tmp_path: Path) -> None:
    norm = {f"{PREFIX}model.layers.0.input_layernorm.weight": torch.ones(16)}
    tensors = {**factors(), **factors("model.layers.1.self_attn.q_proj", r=2), **norm}
    folder = write_adapter(tmp_path / "a", tensors, rank_pattern={"layers.1.self_attn.q_proj": 2})
    assert findings(folder, "llama.cpp") == []

"""Rules of vLLM, against numbers worked out by hand from its sources."""

from pathlib import Path

import pytest
import torch
from stranger_adapters import PREFIX, errors, factors, findings, ids, look, write_adapter

from lora_cli.artifacts.portability_vllm import largest_rank


@pytest.mark.parametrize(
    ("r", "wanted"), [(17, 32), (32, 32), (33, 64), (300, 320), (321, 512), (512, 512)]
)
def test_the_rank_to_ask_for(r: int, wanted: int, tmp_path: Path) -> None:
    (found,) = findings(write_adapter(tmp_path / "a", factors(r=r), r=r), "vllm")
    assert found.severity == "warning"
    assert found.fix == f"start vLLM with --max-lora-rank {wanted}"


def test_the_largest_rank_is_that_of_any_factor(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a", factors(r=24), r=8, rank_pattern={"q_proj": 24})
    assert largest_rank(look(folder)) == 24
    assert "vllm.max-lora-rank" in ids(folder, "vllm")


@pytest.mark.parametrize("is_root", [False, True])
def test_scales_of_patterns(is_root: bool, tmp_path: Path) -> None:
    # With rsLoRA the scale is alpha / sqrt(r): 8 / 2 and 16 / 4 are the same.
    alpha = 16 if is_root else 32
    folder = write_adapter(
        tmp_path / "a",
        factors(r=16),
        rank_pattern={"q_proj": 16},
        alpha_pattern={"q_proj": alpha},
        use_rslora=is_root,
    )
    assert errors(folder, "vllm") == set()
    other = write_adapter(
        tmp_path / "b",
        factors(r=16),
        rank_pattern={"q_proj": 16},
        alpha_pattern={"q_proj": alpha + 1},
        use_rslora=is_root,
    )
    assert errors(other, "vllm") == {"vllm.patterns"}


def test_head_of_its_own_and_something_else(tmp_path: Path) -> None:
    head = {f"{PREFIX}score.weight": torch.ones(2, 16)}
    alone = write_adapter(tmp_path / "a", {**factors(), **head}, modules_to_save=["score"])
    assert errors(alone, "vllm") == {"vllm.head"}
    norm = {f"{PREFIX}model.norm.weight": torch.ones(16)}
    more = write_adapter(tmp_path / "b", {**factors(), **head, **norm}, modules_to_save=["score"])
    assert errors(more, "vllm") == {"vllm.whole"}

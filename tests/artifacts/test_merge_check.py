"""The comparison of tensors: passes what rounding did, and nothing else that is large enough."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lora_cli.artifacts.merge_check import TensorCheck, check_tensor, worst
from lora_cli.artifacts.merge_plan import Piece, changed
from lora_cli.artifacts.tensor_files import NAMES, read_header
from lora_cli.lora.updates import LowRank, Replaced, Rescaled, SomeRows

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def write(path: Path, tensor: torch.Tensor) -> Path:
    save_file({"w": tensor}, path)
    return path


def check(folder: Path, base: torch.Tensor, change: object, merged: torch.Tensor) -> TensorCheck:
    (stored,) = read_header(write(folder / "base.safetensors", base))[1]
    (written,) = read_header(write(folder / "merged.safetensors", merged))[1]
    piece: Piece = changed(stored, change)  # type: ignore[arg-type]
    piece = Piece("w", NAMES[merged.dtype], tuple(merged.shape), stored, piece.change)
    return check_tensor(piece, written, seed=3)


def made(dtype: torch.dtype, size: float = 1.0) -> tuple[torch.Tensor, LowRank, torch.Tensor]:
    torch.manual_seed(0)
    W = (size * torch.randn(300, 200)).to(dtype)
    change = LowRank(torch.randn(4, 200) * 0.1, size * torch.randn(300, 4) * 0.1, 2.0)
    return W, change, change.rows(W, 0, 300).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1.0, 1e-6, 1e3])
def test_rounding_is_allowed(tmp_path: Path, dtype: torch.dtype, size: float) -> None:
    W, change, merged = made(dtype, size)
    found = check(tmp_path, W, change, merged)
    assert found.passed, found
    if size >= 1:
        assert found.kept == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fault", ["lost", "twice", "one row", "transposed", "nan"])
def test_a_wrong_update_is_told(tmp_path: Path, dtype: torch.dtype, fault: str) -> None:
    W, change, merged = made(dtype)
    wrong = merged.clone()
    if fault == "lost":
        wrong = W
    elif fault == "twice":
        wrong = change.rows(merged, 0, 300).to(dtype)
    elif fault == "one row":
        wrong[17] = W[17] + 1
    elif fault == "transposed":
        wrong[:200] = merged[:200].T.contiguous()
    else:
        wrong[0, 0] = torch.nan
    found = check(tmp_path, W, change, wrong)
    assert not found.passed, found


def test_what_rounding_takes_away_is_told_and_allowed(tmp_path: Path) -> None:
    W = torch.ones(64, 64).bfloat16()
    small = LowRank(torch.full((1, 64), 1e-2), torch.full((64, 1), 1e-2), 1.0)
    found = check(tmp_path, W, small, W)
    assert found.passed
    assert found.kept == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_other_changes(tmp_path: Path, dtype: torch.dtype) -> None:
    W, low, _ = made(dtype)
    changes = (
        Rescaled(low.A, low.B, 2.0, torch.rand(300) + 0.5),
        Replaced(torch.randn(300, 200)),
        SomeRows({5: torch.randn(200)}),
    )
    for change in changes:
        merged = change.rows(W, 0, 300).to(dtype)
        assert check(tmp_path, W, change, merged).passed
        assert not check(tmp_path, W, change, W).passed


def test_another_shape_or_format_fails(tmp_path: Path) -> None:
    W, change, merged = made(torch.float32)
    (stored,) = read_header(write(tmp_path / "base.safetensors", W))[1]
    (written,) = read_header(write(tmp_path / "merged.safetensors", merged.half()))[1]
    assert not check_tensor(changed(stored, change), written, seed=0).passed


def test_the_worst_is_named() -> None:
    checks = [TensorCheck("a", 0.1, 0.9, 1), TensorCheck("b", 0.5, 0.2, 1)]
    assert worst(checks) == checks[0]
    assert worst([]) is None

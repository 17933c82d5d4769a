"""`lora-cli convert`: files of other programs, made by hand, run by peft as plain algebra says."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from foreign_adapters import (
    SHAPES,
    added_logits,
    fails,
    kohya,
    loralib,
    mlx,
    peft_adapter,
    peft_logits,
    torchtune,
    write_adapter,
)
from safetensors.torch import load_file

# peft asks a transformers model for an attribute that has another name now.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")


@pytest.mark.parametrize(
    ("write", "name", "more"),
    [
        (loralib, "loralib", ["alpha=6"]),
        (mlx, "mlx-lm", []),
        (torchtune, "torchtune", []),
        (kohya, "kohya", []),
    ],
)
def test_peft_computes_what_the_file_means(
    write: Any, name: str, more: list[str], llama: Path, convert: Any, tmp_path: Path
) -> None:
    adapter, deltas = write(tmp_path / "in")
    done = convert(adapter, f"base={llama}", *more)
    assert done.code == 0, done.err
    result = done.lines[0]
    assert (result["format"], set(result["layers"])) == (name, set(SHAPES))
    assert result["checked_with_base"]
    expected = added_logits(llama, deltas)
    assert (expected - added_logits(llama, {})).abs().max() > 1e-2
    torch.testing.assert_close(peft_logits(llama, tmp_path / "out"), expected, rtol=1e-4, atol=1e-4)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["task_type"]) == (str(llama), "CAUSAL_LM")


def test_a_folder_of_mlx_names_its_base(convert: Any, llama: Path, tmp_path: Path) -> None:
    adapter, deltas = mlx(tmp_path / "in")
    done = convert(adapter)
    assert done.code == 0, done.err
    assert (done.lines[0]["base"], done.lines[0]["checked_with_base"]) == ("some/llama", False)
    assert "shapes were not checked" in done.err
    torch.testing.assert_close(
        peft_logits(llama, tmp_path / "out"), added_logits(llama, deltas), rtol=1e-4, atol=1e-4
    )


def test_more_rank_changes_no_logit(
    written_by_peft: Path, llama: Path, convert: Any, tmp_path: Path
) -> None:
    done = convert(written_by_peft, "r=9")
    assert done.code == 0, done.err
    assert {layer["r"] for layer in done.lines[0]["layers"].values()} == {9}
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["rank_pattern"]) == (9, {})
    torch.testing.assert_close(
        peft_logits(llama, tmp_path / "out"),
        peft_logits(llama, written_by_peft),
        rtol=1e-5,
        atol=1e-5,
    )


def test_less_rank_is_the_closest_update(
    written_by_peft: Path, convert: Any, tmp_path: Path
) -> None:
    done = convert(written_by_peft, "r=2")
    assert done.code == 0, done.err
    before, after = (load_file(p / "adapter_model.safetensors") for p in
                     (written_by_peft, tmp_path / "out"))  # fmt: skip
    whole, kept = 0.0, 0.0
    for name, found in done.lines[0]["layers"].items():
        keys = [f"base_model.model.{name}.lora_{half}.weight" for half in "BA"]
        old, new = ((t[keys[0]].double() @ t[keys[1]].double()).numpy() for t in (before, after))
        u, s, vt = np.linalg.svd(old)
        np.testing.assert_allclose(new, (u[:, :2] * s[:2]) @ vt[:2], atol=1e-4)
        assert found["energy"] == pytest.approx(float((s[:2] ** 2).sum() / (s**2).sum()), rel=1e-5)
        whole += found["scale"] ** 2 * float((s**2).sum())
        kept += found["scale"] ** 2 * float((s[:2] ** 2).sum())
    assert done.lines[0]["energy"] == pytest.approx(kept / whole, rel=1e-5)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    for name, found in done.lines[0]["layers"].items():
        alpha = config["alpha_pattern"].get(name, config["lora_alpha"])
        assert alpha / config["r"] ** 0.5 == pytest.approx(found["scale"], rel=1e-9)


def test_dora_takes_more_rank_and_no_less(llama: Path, convert: Any, tmp_path: Path) -> None:
    adapter = peft_adapter(llama, tmp_path / "dora", use_dora=True)
    fails(convert(adapter, "r=2"), "convert.rank", "DoRA magnitude")
    assert not (tmp_path / "out").exists()
    done = convert(adapter, "r=8", f"base={llama}")
    assert done.code == 0, done.err
    torch.testing.assert_close(
        peft_logits(llama, tmp_path / "out"), peft_logits(llama, adapter), rtol=1e-5, atol=1e-5
    )


def test_what_has_no_factors_of_its_own_keeps_its_rank(convert: Any, tmp_path: Path) -> None:
    config = {"peft_type": "VERA", "target_modules": ["q"], "r": 2, "base_model_name_or_path": "x"}
    tensors = {
        "base_model.vera_A": torch.ones(2, 3),
        "base_model.vera_B": torch.ones(5, 2),
        "base_model.model.q.vera_lambda_b": torch.ones(5),
        "base_model.model.q.vera_lambda_d": torch.ones(2),
    }
    write_adapter(tmp_path / "vera", tensors, config)
    fails(convert(tmp_path / "vera", "r=1"), "convert.rank", "it is of vera")
    assert convert(tmp_path / "vera").code == 0

"""Names whose dots became underscores."""

from pathlib import Path

import pytest
import torch
from foreign_adapters import write_adapter

from lora_cli.artifacts.foreign_file import Base, BaseLayer, read_foreign
from lora_cli.artifacts.foreign_kohya import read_kohya
from lora_cli.errors import UserError

LAYER = BaseLayer(kind="linear", a=(3,), b=5)
DOWN, UP = torch.ones(2, 3), torch.ones(5, 2)


def read(folder: Path, paths: list[str], tensors: dict[str, torch.Tensor]) -> object:
    base = Base(name="BASE", layers=dict.fromkeys(paths, LAYER), settings={})
    return read_kohya(read_foreign(write_adapter(folder, tensors)), base=base, alpha=None)


def pair(name: str) -> dict[str, torch.Tensor]:
    return {f"{name}.lora_down.weight": DOWN, f"{name}.lora_up.weight": UP}


@pytest.mark.parametrize("prefix", ["lora_te_", "lora_te1_", "lora_unet_", ""])
def test_paths_with_underscores_of_their_own(prefix: str, tmp_path: Path) -> None:
    tensors = pair(f"{prefix}text_model_q_proj")
    tensors[f"{prefix}text_model_q_proj.alpha"] = torch.tensor(0.0)
    found = read(tmp_path, ["text_model.q_proj", "text_model.k_proj"], tensors)
    assert [(n, f.scale) for n, f in found.layers.items()] == [("text_model.q_proj", 1.0)]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("paths", "more", "text"),
    [
        (["a.b", "a_b"], {}, "several are called lora_te_a_b"),
        (["a.b"], pair("lora_te_x"), "no layer lora_te_x"),
        (["a.b"], pair("lora_unet_x"), "whose prefixes are lora_te_, lora_unet_"),
        (["a.b"], pair("lora_unet_a_b"), "several are called"),
        (["a.b"], {"lora_te_a_b.dora_scale": UP}, "also holds lora_te_a_b.dora_scale"),
        (["a.b"], {"lora_te_a_b.lora_mid.weight": UP}, "also holds lora_te_a_b.lora_mid.weight"),
        (["a.b"], {"lora_te_x.alpha": torch.tensor(1.0)}, "none for lora_te_x.alpha"),
        (["a.b"], {"lora_te_a_b.alpha": torch.tensor(-1.0)}, "that of lora_te_a_b is -1"),
        (["a.b"], {"lora_te_c.lora_up.weight": UP}, "lacks lora_te_c.lora_down.weight"),
    ],
)
def test_what_means_no_one_layer_is_refused(
    paths: list[str], more: dict[str, torch.Tensor], text: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as caught:
        read(tmp_path, paths, {**pair("lora_te_a_b"), **more})
    assert text in "\n".join(problem.message for problem in caught.value.problems)

"""Files of torchtune: rows of the attention, and what its own conversion does not know."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_adapters import HEADS, KV_HEADS, SIZE, torchtune, updates

from lora_cli.artifacts.foreign_file import Base, read_foreign
from lora_cli.artifacts.foreign_torchtune import read_torchtune
from lora_cli.errors import UserError


def base(**changes: Any) -> Base:
    settings = {
        "model_type": "llama",
        "hidden_size": SIZE,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": None,
    }
    return Base(name="BASE", layers={}, settings={**settings, **changes})


def test_rows_come_into_the_order_of_transformers(tmp_path: Path) -> None:
    file = read_foreign(torchtune(tmp_path)[0])
    found = read_torchtune(file, base=base(), alpha=None)
    for name, (a, b) in updates(3).items():
        assert torch.equal(found.layers[name].A, a)
        assert torch.equal(found.layers[name].B, b)
        assert found.layers[name].scale == 4.0


def test_rotary_embeddings_of_both_orders_agree(tmp_path: Path) -> None:
    """Neighbours turned by one angle there, halves turned by one angle here."""
    file = read_foreign(torchtune(tmp_path)[0])
    found = read_torchtune(file, base=base(), alpha=None).layers
    theirs = file.tensors["layers.0.attn.k_proj.lora_b.weight"][:, 0].view(KV_HEADS, -1, 2)
    ours = found["model.layers.0.self_attn.k_proj"].B[:, 0].view(KV_HEADS, 2, -1)
    angles = torch.linspace(0.1, 1.0, theirs.shape[1])
    turned = torch.view_as_complex(theirs.contiguous()) * torch.exp(1j * angles)
    half_1 = ours[:, 0] * angles.cos() - ours[:, 1] * angles.sin()
    half_2 = ours[:, 1] * angles.cos() + ours[:, 0] * angles.sin()
    torch.testing.assert_close(torch.complex(half_1, half_2), turned)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"model_type": "qwen2"}, "'qwen2' is not known"),
        ({"num_key_value_heads": 4}, "4 heads of 4 rows"),
        ({"head_dim": 8}, "2 heads of 8 rows"),
    ],
)
def test_a_base_whose_rows_are_not_known_is_refused(
    changes: dict[str, Any], text: str, tmp_path: Path
) -> None:
    file = read_foreign(torchtune(tmp_path)[0])
    with pytest.raises(UserError) as caught:
        read_torchtune(file, base=base(**changes), alpha=None)
    assert text in caught.value.problems[0].message


@pytest.mark.parametrize("change", [{"r": 4}, {"r": 0}, {"lora_alpha": None}, {"lora_alpha": "8"}])
def test_a_config_that_does_not_fit_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    folder, _ = torchtune(tmp_path)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UserError) as caught:
        read_torchtune(read_foreign(folder), base=base(), alpha=None)
    assert caught.value.problems[0].id == "convert.unsupported"


def test_layers_of_other_names_and_magnitudes_are_refused(tmp_path: Path) -> None:
    file = read_foreign(torchtune(tmp_path)[0])
    more = {f"layers.0.attn.qkv.lora_{leaf}.weight": torch.ones(3, 3) for leaf in "ab"}
    for tensors, text in (
        (more, r"layers\.0\.attn\.qkv"),
        ({"layers.0.attn.q_proj.magnitude": torch.ones(16)}, "also holds .*magnitude"),
    ):
        file = read_foreign(tmp_path)
        grown = type(file)(path=file.path, tensors={**file.tensors, **tensors}, config=file.config)
        with pytest.raises(UserError, match=text):
            read_torchtune(grown, base=base(), alpha=None)

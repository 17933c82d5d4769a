"""Names and the order of features, against the gguf package and a rotation written out."""

import gguf
import torch
from tiny_llama import random_llama

from lora_cli.artifacts.exporters.gguf_names import gguf_name, heads_of, interleave, separate


def test_every_weight_has_the_name_that_the_gguf_package_gives_it() -> None:
    model = random_llama(10)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    modules = [name.removesuffix(".weight") for name in model.state_dict()]
    assert len(modules) == 2 * 9 + 3
    assert [gguf_name(module) for module in modules] == [names.get_name(m) for m in modules]
    assert gguf_name("model.layers.0.self_attn.q_norm") is None
    assert gguf_name("score") is None


def test_only_queries_and_keys_have_another_order() -> None:
    config = random_llama(10).config
    assert heads_of("model.layers.1.self_attn.q_proj", config) == 4
    assert heads_of("model.layers.1.self_attn.k_proj", config) == 2
    for other in ("self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj"):
        assert heads_of(f"model.layers.1.{other}", config) is None


def test_features_of_a_pair_become_neighbours() -> None:
    heads, features = 3, 8
    angles = torch.linspace(0.1, 2, features // 2)
    vector = torch.randn(heads, features, generator=torch.Generator().manual_seed(0))
    # transformers: feature n of a head turns with feature n + features / 2.
    first, second = vector[:, : features // 2], vector[:, features // 2 :]
    cos, sin = angles.cos(), angles.sin()
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=1)
    # llama.cpp: feature 2 n turns with feature 2 n + 1.
    pairs = interleave(vector.reshape(-1, 1), heads).reshape(heads, -1, 2)
    x, y = pairs.unbind(-1)
    here = torch.stack([x * cos - y * sin, y * cos + x * sin], dim=-1).reshape(-1, 1)
    assert torch.allclose(interleave(turned.reshape(-1, 1), heads), here, atol=1e-6)
    assert not torch.allclose(turned.reshape(-1, 1), here, atol=1e-2)


def test_separating_undoes_it_and_others_stay() -> None:
    rows = torch.randn(12, 5)
    assert torch.equal(separate(interleave(rows, 3), 3), rows)
    assert interleave(rows, None) is rows
    assert separate(rows, None) is rows

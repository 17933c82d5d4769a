import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, ViTConfig, ViTModel

from lora_cli.errors import UserError
from lora_cli.training.noise import add_noise, check_noise


class Model(nn.Module):
    """An embedding table, with its output as that of the model."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.table = nn.Embedding(50, width)
        self.dropout = nn.Dropout(0.0)

    def get_input_embeddings(self) -> nn.Module:
        return self.table

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> Any:
        embedded: torch.Tensor = self.table(input_ids)
        return SimpleNamespace(embedded=embedded)


def noise(
    width: int, lengths: list[int], *, alpha: float = 5.0, seed: int = 0, **options: Any
) -> torch.Tensor:
    """Return what was added, for rows of these lengths padded to the longest."""
    model = Model(width)
    ids = torch.randint(50, (len(lengths), max(lengths)))
    positions = torch.arange(max(lengths))
    mask = (positions < torch.tensor(lengths)[:, None]).long()
    plain = model(ids).embedded.detach()
    add_noise(model, alpha)
    model.train(options.get("training", True))
    torch.manual_seed(seed)
    with_mask = {"attention_mask": mask} if options.get("mask", True) else {}
    return (model(ids, **with_mask).embedded - plain).detach()


def test_it_is_uniform_within_the_bounds_of_the_paper_on_tokens_alone() -> None:
    lengths, width = [200, 50], 64
    added = noise(width, lengths)
    for row, length in zip(added, lengths, strict=True):
        bound = 5.0 / math.sqrt(length * width)
        values = row[:length].flatten()
        assert values.abs().max() <= bound * 1.001
        # A uniform number in [-b, b] has mean 0, variance b^2 / 3, and half of it beyond b / 2.
        assert abs(values.mean()) < 5 * bound / math.sqrt(3 * values.numel())
        assert values.var().item() == pytest.approx(bound**2 / 3, rel=0.1)
        assert (values.abs() > bound / 2).float().mean().item() == pytest.approx(0.5, abs=0.05)
        assert not row[length:].any()


def test_it_is_a_function_of_the_seed() -> None:
    assert torch.equal(noise(4, [3]) != 0, torch.ones(1, 3, 4, dtype=torch.bool))
    first, again, other = noise(8, [6]), noise(8, [6]), noise(8, [6], seed=1)
    torch.testing.assert_close(first, again, rtol=0, atol=1e-6)
    assert not torch.allclose(first, other, atol=1e-3)


def test_there_is_none_in_evaluation() -> None:
    assert not noise(8, [6, 2], training=False).any()


def test_without_a_mask_every_position_counts() -> None:
    added = noise(64, [100], mask=False)
    assert added.abs().max().item() == pytest.approx(5 / math.sqrt(6400), rel=0.01)


def test_a_table_with_an_adapter_around_it_is_one() -> None:
    wrapped = nn.Module()
    wrapped.base_layer = nn.Embedding(2, 2)
    check_noise(SimpleNamespace(get_input_embeddings=lambda: wrapped))


def test_a_real_model_has_other_outputs_in_training_only() -> None:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=20,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model, ids = BertModel(config), torch.tensor([[1, 2, 3]])
    plain = model(ids).last_hidden_state
    add_noise(model, 5.0)
    assert torch.equal(model.eval()(ids).last_hidden_state, plain)
    assert not torch.allclose(model.train()(ids).last_hidden_state, plain, atol=1e-2)


def test_models_of_images_are_refused() -> None:
    sizes: dict[str, int] = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    with pytest.raises(UserError, match="no embedding of tokens"):
        check_noise(ViTModel(ViTConfig(**sizes, intermediate_size=8, image_size=16, patch_size=8)))
    with pytest.raises(UserError):
        check_noise(nn.Linear(2, 2))

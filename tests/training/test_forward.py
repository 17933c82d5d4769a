import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel
from transformers.modeling_layers import GradientCheckpointingLayer

from lora_cli.config.sections import TrainerConfig
from lora_cli.errors import UserError
from lora_cli.training.forward import change_forward, check_forward

SIZES = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}


def test_every_change_that_a_model_refuses_is_named() -> None:
    check_forward(nn.Linear(2, 2), TrainerConfig())
    with pytest.raises(UserError) as caught:
        check_forward(
            nn.Linear(2, 2), TrainerConfig(neftune_alpha=5.0, gradient_checkpointing=True)
        )
    assert [problem.id for problem in caught.value.problems] == [
        "trainer.no-embedding",
        "trainer.no-checkpointing",
    ]


@pytest.mark.parametrize("alpha", [None, 5.0])
@pytest.mark.parametrize("recompute", [False, True])
def test_changes_are_made_that_were_asked_for(alpha: float | None, recompute: bool) -> None:
    config = TrainerConfig(neftune_alpha=alpha, gradient_checkpointing=recompute)
    model = BertModel(BertConfig(vocab_size=20, intermediate_size=8, **SIZES))
    check_forward(model, config)
    change_forward(model, config)
    blocks = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    assert blocks
    assert all(block.gradient_checkpointing == recompute for block in blocks)
    embedding, ids = model.get_input_embeddings().train(), torch.tensor([[1, 2]])
    assert torch.equal(embedding(ids), embedding.weight[ids]) == (alpha is None)

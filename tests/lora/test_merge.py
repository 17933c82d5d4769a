import copy

import pytest
import torch
from torch import nn

from lora_cli.lora.inject import inject_lora
from lora_cli.lora.linear import LoraLinear
from lora_cli.lora.merge import merge_lora
from lora_cli.lora.settings import LoraSettings


def test_merged_model_is_plain_and_computes_the_same() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Sequential(nn.Linear(5, 4)))
    model = copy.deepcopy(plain)
    inject_lora(model, ["0", "2.0"], LoraSettings(r=2, alpha=4.0, dropout=0.3))
    for module in model.modules():
        if isinstance(module, LoraLinear):
            nn.init.normal_(module.lora_B.weight)
    model.eval()
    x = torch.randn(3, 6)
    before = model(x)
    expected = plain[0].weight + 2.0 * model[0].lora_B.weight @ model[0].lora_A.weight
    merge_lora(model)
    assert (model(x) - plain(x)).abs().max() > 0.1
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model[0].weight, expected)
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    with pytest.raises(ValueError, match="has none"):
        merge_lora(model)

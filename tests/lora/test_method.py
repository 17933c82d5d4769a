from torch import nn

from lora_cli.lora.adalora import RankAllocator
from lora_cli.lora.inject import inject_lora
from lora_cli.lora.merge import merge_lora
from lora_cli.lora.method import build_method
from lora_cli.lora.settings import AdaLoraSettings, LoraSettings


def test_only_adalora_acts_at_each_step() -> None:
    for variant in ("lora", "vera"):
        model = nn.ModuleList([nn.Linear(3, 3)])
        settings = LoraSettings(r=2, alpha=1.0, variant=variant)
        inject_lora(model, ["0"], settings)
        assert build_method(model, settings) is None
    plan = AdaLoraSettings(init_r=5, total_steps=9, warmup_steps=1, final_steps=2)
    model = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
    settings = LoraSettings(r=2, alpha=1.0, variant="adalora", adalora=plan)
    inject_lora(model, ["0", "1"], settings)
    method = build_method(model, settings)
    assert isinstance(method, RankAllocator)
    assert [method.budget(step) for step in (1, 7)] == [10, 4]
    merge_lora(model)
    assert build_method(model, settings) is None

"""AdaLoRA against PEFT's rank allocator over whole schedules, and its files both ways."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
)

from lora_cli.artifacts.peft_format import PeftAdapter, load_peft, peft_files
from lora_cli.lora.adalora import AdaLoraLinear, RankAllocator
from lora_cli.lora.inject import freeze_base, inject_lora, trainable_parameters
from lora_cli.lora.merge import merge_lora
from lora_cli.lora.settings import AdaLoraSettings, LoraSettings
from lora_cli.lora.state import adapter_state, load_adapter_state
from lora_cli.lora.targets import match_targets

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # Layers may lose all of their ranks: PEFT then makes empty tensors, and says so.
    pytest.mark.filterwarnings("ignore:Initializing zero-element tensors:UserWarning"),
    pytest.mark.filterwarnings("ignore:Adapter 'default'. [0-9]+ LoRA tensor.s. have invalid"),
    # PEFT warns of the masks that it wrote itself.
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning"),
]


PLAN = AdaLoraSettings(init_r=4, total_steps=30, warmup_steps=3, final_steps=8, every=2)


SETTINGS = LoraSettings(r=2, alpha=6.0, variant="adalora", adalora=PLAN)


TARGETS = {"bert": ("query", "value", "output.dense"), "gpt2": ("c_attn", "c_proj")}


HEAD = {"bert": "classifier", "gpt2": "score"}


def build_base(family: str) -> nn.Module:
    torch.manual_seed(0)
    if family == "bert":
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
        config = BertConfig(vocab_size=40, num_attention_heads=2, num_labels=3, **sizes)
        return BertForSequenceClassification(config).eval()
    gpt2 = GPT2Config(
        vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=2, num_labels=3, pad_token_id=0
    )
    return GPT2ForSequenceClassification(gpt2).eval()


def batch(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {
        "input_ids": torch.randint(1, 40, (6, 7), generator=generator),
        "labels": torch.randint(0, 3, (6,), generator=generator),
    }


def build_ours(family: str, settings: LoraSettings = SETTINGS) -> nn.Module:
    base = build_base(family)
    names = match_targets(base, targets=TARGETS[family], saved_modules=(HEAD[family],))
    torch.manual_seed(1)
    inject_lora(base, names, settings)
    freeze_base(base, (HEAD[family],))
    return base


def train_step(
    ours: nn.Module, allocator: RankAllocator, optimizer: torch.optim.Optimizer, step: int
) -> None:
    loss = ours(**batch(step)).loss
    penalty = allocator.penalty()
    (loss if penalty is None else loss + penalty).backward()
    optimizer.step()
    allocator.after_step(step)
    optimizer.zero_grad()


def masks_of(model: nn.Module) -> dict[str, list[bool]]:
    return {
        f"{name}.lora_E": (module.lora_E.flatten() != 0).tolist()
        for name, module in model.named_modules()
        if isinstance(module, AdaLoraLinear)
    }


def build_peft(family: str, settings: LoraSettings = SETTINGS) -> PeftModel:
    plan = settings.adalora
    assert plan is not None
    config = AdaLoraConfig(
        init_r=plan.init_r,
        target_r=settings.r,
        lora_alpha=settings.alpha,
        total_step=plan.total_steps,
        tinit=plan.warmup_steps,
        tfinal=plan.final_steps,
        deltaT=plan.every,
        beta1=plan.beta1,
        beta2=plan.beta2,
        orth_reg_weight=plan.orthogonal,
        target_modules=list(TARGETS[family]),
        modules_to_save=[HEAD[family]],
        task_type="SEQ_CLS",
    )
    return get_peft_model(build_base(family), config).eval()


def plain_name(name: str) -> str:
    name = name.removeprefix("base_model.model.").removesuffix(".default")
    return name.replace(".modules_to_save.default", "").replace(".original_module", ".unused")


def their_trained(model: PeftModel) -> dict[str, nn.Parameter]:
    return {plain_name(n): p for n, p in model.named_parameters() if p.requires_grad}


def copy_start(ours: nn.Module, theirs: PeftModel) -> None:
    """Give PEFT's model our start."""
    parameters = their_trained(theirs)
    assert parameters.keys() == trainable_parameters(ours).keys()
    with torch.no_grad():
        for name, parameter in trainable_parameters(ours).items():
            parameters[name].copy_(parameter)


def gap(one: nn.Module, other: nn.Module) -> float:
    inputs = {"input_ids": batch(999)["input_ids"]}
    with torch.no_grad():
        return (one(**inputs).logits - other(**inputs).logits).abs().max().item()


SCHEDULES = [
    PLAN,
    # Ranks go at every step, and to the very last one.
    AdaLoraSettings(init_r=3, total_steps=12, warmup_steps=0, final_steps=0, every=1, beta1=0.5),
    # No step of the reduction is a multiple of `every`, so that all ranks go at once.
    AdaLoraSettings(init_r=5, total_steps=10, warmup_steps=2, final_steps=4, every=50),
]


@pytest.mark.parametrize("plan", SCHEDULES, ids=["usual", "every-step", "at-once"])
@pytest.mark.parametrize("family", TARGETS)
def test_a_whole_schedule_equals_peft(family: str, plan: AdaLoraSettings, tmp_path: Path) -> None:
    settings = replace(SETTINGS, r=2, adalora=plan)
    ours, theirs = build_ours(family, settings), build_peft(family, settings)
    copy_start(ours, theirs)
    allocator = RankAllocator(ours, r=2, settings=plan)
    mine, other = trainable_parameters(ours), their_trained(theirs)
    optimizer = torch.optim.SGD(mine.values(), lr=0.5)
    optimizer_theirs = torch.optim.SGD(other.values(), lr=0.5)
    penalty = allocator.penalty()
    assert penalty is not None
    with torch.no_grad():
        plain = ours(**batch(1)).loss
        torch.testing.assert_close(plain + penalty, theirs(**batch(1)).loss, rtol=0, atol=1e-6)
    changed = set()
    for step in range(1, plan.total_steps + 1):
        train_step(ours, allocator, optimizer, step)
        theirs(**batch(step)).loss.backward()
        optimizer_theirs.step()
        theirs.base_model.update_and_allocate(step)
        optimizer_theirs.zero_grad()
        for name, parameter in mine.items():
            torch.testing.assert_close(parameter, other[name], rtol=1e-4, atol=2e-6)
        compare_importance(allocator, theirs)
        pattern = theirs.peft_config["default"].rank_pattern or {}
        changed.add(sum(map(sum, pattern.values())))
        if step >= plan.total_steps - plan.final_steps:
            found = {plain_name(n).removesuffix(".default"): mask for n, mask in pattern.items()}
            assert masks_of(ours) == found
    layers = len(masks_of(ours))
    assert sum(map(sum, masks_of(ours).values())) == 2 * layers < plan.init_r * layers
    assert plan.every > 1 or len(changed) > 3
    assert gap(ours, build_base(family)) > 1e-2
    assert gap(ours, theirs) <= 1e-5

    # What PEFT writes at the end is what we write, and each loads the other's.
    theirs.save_pretrained(tmp_path / "theirs")
    write(tmp_path / "ours", ours, settings, family)
    compare_files(tmp_path)
    for folder in ("ours", "theirs"):
        loaded, _ = load_ours(tmp_path / folder, family)
        peft_model = PeftModel.from_pretrained(build_base(family), tmp_path / folder).eval()
        assert gap(ours, loaded) <= 1e-6
        assert gap(ours, peft_model) <= 1e-5
        merge_lora(loaded)
        assert gap(peft_model.merge_and_unload(), loaded) <= 1e-5
        assert gap(ours, loaded) <= 1e-5


def write(folder: Path, model: nn.Module, settings: LoraSettings, family: str) -> None:
    folder.mkdir(parents=True)
    adapter = PeftAdapter(
        settings=settings,
        targets=(),
        saved_modules=(HEAD[family],),
        task_type="SEQ_CLS",
        base_name=None,
        revision=None,
        fan_in_fan_out=family == "gpt2",
        state=adapter_state(model, (HEAD[family],)),
    )
    modules = [name for name, _ in build_base(family).named_modules()]
    for name, content in peft_files(adapter, module_names=modules).items():
        (folder / name).write_bytes(content)


def load_ours(folder: Path, family: str) -> tuple[nn.Module, PeftAdapter]:
    adapter = load_peft(folder)
    base = build_base(family)
    names = match_targets(base, targets=adapter.targets, saved_modules=adapter.saved_modules)
    inject_lora(base, names, adapter.settings)
    freeze_base(base, adapter.saved_modules)
    load_adapter_state(base, adapter.state, adapter.saved_modules)
    return base, adapter


def compare_files(folder: Path) -> None:
    states = [load_file(folder / who / "adapter_model.safetensors") for who in ("ours", "theirs")]
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        torch.testing.assert_close(tensor, states[1][name], rtol=1e-4, atol=2e-6)
    configs: list[dict[str, Any]] = []
    for who in ("ours", "theirs"):
        config = json.loads((folder / who / "adapter_config.json").read_text())
        config.pop("peft_version")
        config["modules_to_save"] = {*config["modules_to_save"], "classifier", "score"}
        # Names of one part are the shorter form of ours; what they select is compared elsewhere.
        config.pop("target_modules")
        configs.append(config)
    assert configs[0] == configs[1]


def compare_importance(allocator: RankAllocator, theirs: PeftModel) -> None:
    """Both running means; PEFT too forgets them when the ranks are settled."""
    reference = theirs.base_model.rankallocator
    parts = (("mean", reference.exp_avg_ipt), ("change", reference.exp_avg_unc))
    expected = {
        f"{part}/{plain_name(name)}": value
        for part, values in parts
        for name, value in values.items()
    }
    found = {n: t for n, t in allocator.state().items() if not n.startswith("alive/")}
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-8)


def test_settings_survive_the_file(tmp_path: Path) -> None:
    ours = build_ours("bert")
    for layer in ours.modules():
        if isinstance(layer, AdaLoraLinear):
            nn.init.normal_(layer.lora_E)
            layer.lora_E.data[1] = 0
    write(tmp_path / "a", ours, replace(SETTINGS, dropout=0.25, bias="lora_only"), "bert")
    loaded = load_peft(tmp_path / "a")
    assert loaded.settings == replace(SETTINGS, dropout=0.25, bias="lora_only")
    # In memory every rank is there again, and those that are gone are zero.
    state = adapter_state(ours, ())
    for name in (n for n in state if n.endswith("lora_E")):
        assert torch.equal(loaded.state[name], state[name])
        for leaf, axis in (("lora_A", 0), ("lora_B", 1)):
            key = name.replace("lora_E", leaf)
            kept = torch.tensor([0, 2, 3])
            narrow = state[key].index_select(axis, kept)
            assert torch.equal(loaded.state[key].index_select(axis, kept), narrow)
            assert not loaded.state[key].select(axis, 1).any()


def test_a_layer_without_ranks_in_both_programs(tmp_path: Path) -> None:
    ours = build_ours("bert")
    for number, layer in enumerate(m for m in ours.modules() if isinstance(m, AdaLoraLinear)):
        nn.init.normal_(layer.lora_E, std=100)
        if number == 0:
            nn.init.zeros_(layer.lora_E)
    write(tmp_path / "a", ours, SETTINGS, "bert")
    sizes = [t.shape for n, t in load_file(tmp_path / "a/adapter_model.safetensors").items()]
    assert (0, 16) in sizes
    peft_model = PeftModel.from_pretrained(build_base("bert"), tmp_path / "a").eval()
    loaded, _ = load_ours(tmp_path / "a", "bert")
    assert gap(ours, build_base("bert")) > 1e-3
    assert gap(ours, peft_model) <= 1e-5
    assert gap(ours, loaded) == 0.0
    # PEFT's own file of it.
    peft_model.save_pretrained(tmp_path / "b")
    again, _ = load_ours(tmp_path / "b", "bert")
    assert gap(ours, again) <= 1e-6

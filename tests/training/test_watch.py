"""The dead-adapter alarm: real ways to be cut off, and everything that only looks like one."""

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from lora_cli.config.optim import SgdConfig
from lora_cli.errors import RunFailedError
from lora_cli.lora.inject import freeze_base, inject_lora
from lora_cli.lora.settings import AdaLoraSettings, LoraSettings
from lora_cli.training.watch import LAST_STEP, AdapterWatch

_spec = importlib.util.spec_from_file_location(
    "watch_support", Path(__file__).with_name("support.py")
)
assert _spec is not None
assert _spec.loader is not None
support = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(support)
build_trainer = support.build_trainer

_watched_spec = importlib.util.spec_from_file_location(
    "watched_of_watch", Path(__file__).with_name("watched.py")
)
assert _watched_spec is not None
assert _watched_spec.loader is not None
watched = importlib.util.module_from_spec(_watched_spec)
_watched_spec.loader.exec_module(watched)
Net, train, fault, PLAIN = watched.Net, watched.train, watched.fault, watched.PLAIN

ModelDir = Callable[..., Path]
# The old name of a method of transformers that the oldest supported release has too.
RENAMED = pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is dep:FutureWarning")


ADALORA = replace(PLAIN, variant="adalora", adalora=AdaLoraSettings(init_r=3, total_steps=9))


@pytest.mark.parametrize(
    "settings",
    [PLAIN, replace(PLAIN, lora_bias=True), ADALORA, replace(PLAIN, variant="vera")],
    ids=["lora", "lora-bias", "adalora", "vera"],
)
def test_a_healthy_run_is_watched_for_two_steps(settings: LoraSettings) -> None:
    net = Net(settings)
    assert train(net, AdapterWatch(net, ("head",)), steps=30) == 2
    assert not any(module._forward_hooks for module in net.modules())


def test_the_loop_stops_watching(tiny_model_dir: ModelDir, toy_reviews: Path) -> None:
    trainer = build_trainer(tiny_model_dir(), toy_reviews, epochs=1)
    trainer.run()
    assert trainer._watch is None
    resumed = build_trainer(tiny_model_dir(), toy_reviews, epochs=10)
    resumed.progress = replace(resumed.progress, step=LAST_STEP)
    resumed._start_watch()
    assert resumed._watch is None


@RENAMED
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
@pytest.mark.parametrize("steps", [16, 2])
def test_reentrant_checkpointing_over_frozen_inputs(
    tiny_model_dir: ModelDir, toy_reviews: Path, steps: int
) -> None:
    trainer = build_trainer(tiny_model_dir(), toy_reviews, max_steps=steps, eval_steps=16)
    trainer._plain_model.gradient_checkpointing_enable({"use_reentrant": True})
    # Newer releases of transformers make the embeddings of text models require gradients.
    trainer._plain_model.disable_input_require_grads()
    before = trainer.adapter()
    with pytest.raises(RunFailedError) as caught:
        trainer.run()
    (problem,) = caught.value.problems
    assert problem.id == "train.dead-adapter"
    names = [
        f"bert.encoder.layer.{n}.attention.self.{w}" for n in (0, 1) for w in ("query", "value")
    ]
    assert "4 of 4 ran without the loss depending on them" in problem.message
    assert f"in the first {min(steps, 3)} steps: {', '.join(names)}." in problem.message
    assert "use_reentrant=False" in (problem.fix or "")
    assert "lora.exclude=[bert.encoder.layer.0.attention.self.query," in (problem.fix or "")
    after = trainer.adapter()
    assert all(torch.equal(after[n], before[n]) for n in before if "lora_" in n)


@RENAMED
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
def test_reentrant_checkpointing_of_pictures() -> None:
    """Nothing makes pixels require gradients."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    config = ViTConfig(image_size=8, patch_size=4, num_attention_heads=2, num_labels=2, **sizes)
    torch.manual_seed(0)
    model = ViTForImageClassification(config)
    names = [n for n, _ in model.named_modules() if n.endswith(("query", "value", "q_proj"))]
    assert len(names) >= 2
    inject_lora(model, names, PLAIN)
    freeze_base(model, ("classifier",))
    model.gradient_checkpointing_enable({"use_reentrant": True})
    watch = AdapterWatch(model.train(), ("classifier",))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(pixel_values=torch.randn(3, 3, 8, 8), labels=torch.tensor([0, 1, 1])).loss.backward()
    watch.look()
    optimizer.step()
    with pytest.raises(RunFailedError, match=f"{len(names)} of {len(names)} ran without the loss"):
        watch.confirm(last=True)


@RENAMED
@pytest.mark.parametrize("how", ["plain", "inputs"])
def test_checkpointing_that_works(tiny_model_dir: ModelDir, toy_reviews: Path, how: str) -> None:
    trainer = build_trainer(tiny_model_dir(), toy_reviews, max_steps=4)
    model = trainer._plain_model
    model.gradient_checkpointing_enable({"use_reentrant": how == "inputs"})
    if how == "inputs":
        model.enable_input_require_grads()
    trainer.run()
    assert trainer._watch is None


def test_a_detached_layer_is_named() -> None:
    net = Net()
    net.route = lambda net, x: net.two(net.one(x).detach())
    error = fault(net)
    assert "1 of 2 ran without the loss depending on them in the first 3 steps: one." in str(error)
    (problem,) = error.problems
    assert problem.key == "lora.targets"
    assert "lora.exclude=[one]" in (problem.fix or "")


def test_a_branch_that_is_not_taken() -> None:
    net = Net()
    net.route = lambda net, x: net.one(x)
    error = fault(net)
    assert "1 of 2 never ran in the first 20 steps: two." in str(error)
    assert "lora.exclude=[two]" in (error.problems[0].fix or "")


def test_a_layer_that_evaluation_alone_runs_has_not_run() -> None:
    net = Net()
    net.route = lambda net, x: net.one(x) if net.training else net.two(net.one(x))
    watch = AdapterWatch(net, ("head",))
    net.eval()
    net(torch.randn(2, 4))
    net.train()
    with pytest.raises(RunFailedError, match=r"never ran in the first 20 steps: two\."):
        train(net, watch, steps=30)


def test_a_layer_that_random_depth_drops_for_long() -> None:
    net = Net()
    runs = iter([False] * 15 + [True] * 15)
    net.route = lambda net, x: net.two(net.one(x)) if next(runs) else net.one(x)
    assert train(net, AdapterWatch(net, ("head",)), steps=30) == 17


def test_a_short_run_may_leave_a_layer_out() -> None:
    net = Net()
    net.route = lambda net, x: net.one(x)
    assert train(net, AdapterWatch(net, ("head",)), steps=6) == 6


def test_a_gradient_of_zero_throughout() -> None:
    for steps, watched in ((30, 20), (4, 4)):
        net = Net()
        net.route = lambda net, x: net.one(x) + 0.0 * net.two(x)
        expected = f"1 of 2 had a gradient of zero throughout the first {watched} steps: two."
        assert expected in str(fault(net, steps=steps))


def test_a_head_that_starts_at_zero_is_waited_for() -> None:
    """Until the head has moved, no gradient but zero reaches what is below it."""
    net = Net()
    nn.init.zeros_(net.head.weight)
    nn.init.ones_(net.head.bias)
    assert train(net, AdapterWatch(net, ("head",)), steps=30) == 3


def test_the_penalty_of_a_method_hides_nothing(tiny_model_dir: ModelDir, toy_reviews: Path) -> None:
    """AdaLoRA's penalty gives every factor a gradient, whether the loss reaches it or not."""
    plan = AdaLoraSettings(init_r=3, total_steps=16)
    trainer = build_trainer(
        tiny_model_dir(), toy_reviews, lora=replace(PLAIN, variant="adalora", adalora=plan)
    )
    trainer._plain_model.bert.encoder.layer[0].register_forward_hook(
        lambda _m, _i, output: output.detach()
    )
    with pytest.raises(RunFailedError, match="2 of 4 ran without the loss depending on them"):
        trainer.run()


def test_steps_that_were_skipped_do_not_count() -> None:
    net = Net()
    assert train(net, AdapterWatch(net, ("head",)), steps=30, skipped=(1, 2, 3, 4)) == 6


def test_an_optimizer_that_lacks_a_tensor() -> None:
    net = Net()
    watch = AdapterWatch(net, ("head",))
    with pytest.raises(RunFailedError, match=r"1 of 2 stayed as they were.*20 steps: two\."):
        train(net, watch, steps=30, without="two.lora_B.weight")
    net = Net()
    watch = AdapterWatch(net, ("head",))
    with pytest.raises(RunFailedError, match=r"1 stayed as they were.*4 steps: head\.bias\."):
        train(net, watch, steps=4, without="head.bias")


def test_a_learning_rate_too_small_to_change_anything(
    tiny_model_dir: ModelDir, toy_reviews: Path
) -> None:
    trainer = build_trainer(tiny_model_dir(), toy_reviews, optimizer=SgdConfig(lr=1e-30))
    with pytest.raises(RunFailedError, match=r"stayed as they were.*classifier\.weight"):
        trainer.run()


def test_many_names_are_cut_short() -> None:
    class Many(Net):
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.one = nn.Identity()
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(30))
            self.head = nn.Linear(4, 2)
            self.route = lambda _, x: (
                torch.stack([layer(x) for layer in self.layers]).sum(0).detach()
            )
            inject_lora(self, [f"layers.{n}" for n in range(30)], PLAIN)
            freeze_base(self, ("head",))

    error = fault(Many())
    assert "30 of 30 ran" in str(error)
    assert "layers.19 and 10 more." in str(error)
    fix = error.problems[0].fix or ""
    assert fix.endswith(",layers.18,layers.19,...]")

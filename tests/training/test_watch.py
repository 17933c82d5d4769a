"""The dead-adapter alarm: real ways to be cut off, and everything that only looks like one."""

import importlib.util
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, ViTConfig, ViTForImageClassification

from lora_cli.config.optim import SgdConfig
from lora_cli.config.strategies import AdapterStrategyConfig, PrefixStrategyConfig
from lora_cli.errors import RunFailedError
from lora_cli.lora.inject import freeze_base, inject_lora
from lora_cli.lora.layer import AdapterLayer
from lora_cli.lora.settings import AdaLoraSettings, LoraSettings
from lora_cli.lora.strategies import apply_strategy
from lora_cli.training.watch import LAST_STEP, AdapterWatch

_spec = importlib.util.spec_from_file_location(
    "watch_support", Path(__file__).with_name("support.py")
)
assert _spec is not None
assert _spec.loader is not None
support = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(support)
build_trainer = support.build_trainer

ModelDir = Callable[..., Path]
PLAIN = LoraSettings(r=2, alpha=4.0)
# The old name of a method of transformers that the oldest supported release has too.
RENAMED = pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is dep:FutureWarning")


class Net(nn.Module):
    """Two adapted layers, a pooler that may be unused, a head; `route` says what runs."""

    # As models of transformers name their body: the rest is a head.
    base_model_prefix = "body"

    @property
    def base_model(self) -> nn.Module:
        return self.one

    def __init__(self, settings: LoraSettings = PLAIN, *, saved: tuple[str, ...] = ()) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one = nn.Linear(4, 4)
        self.two = nn.Linear(4, 4)
        self.pooler = nn.Linear(4, 4)
        self.head = nn.Linear(4, 2)
        self.route: Callable[[Net, torch.Tensor], torch.Tensor] = lambda net, x: net.two(net.one(x))
        inject_lora(self, ["one", "two"], settings)
        freeze_base(self, ("head", *saved))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.head(self.route(self, x))
        return y


def train(
    net: Net, watch: AdapterWatch, *, steps: int, without: str = "", skipped: tuple[int, ...] = ()
) -> int:
    """Run steps of the loop's kind; return after how many the watch was over."""
    chosen = [p for n, p in net.named_parameters() if p.requires_grad and n != without]
    optimizer = torch.optim.SGD(chosen, lr=0.1)
    for step in range(1, steps + 1):
        net.zero_grad()
        torch.manual_seed(step)
        net(torch.randn(5, 4)).square().sum().backward()
        watch.look()
        if step in skipped:
            continue
        optimizer.step()
        if watch.confirm(last=step == steps):
            return step
    return steps


def fault(net: Net, *, steps: int = 30, **options: Any) -> RunFailedError:
    watch = AdapterWatch(net, options.pop("saved", ("head",)), **options)
    with pytest.raises(RunFailedError) as caught:
        train(net, watch, steps=steps)
    assert all(problem.id == "train.dead-adapter" for problem in caught.value.problems)
    assert caught.value.exit_code == 1
    # Nothing of it is left in the model.
    assert not any(module._forward_hooks for module in net.modules())
    return caught.value


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


def never_pooled(net: Net, x: torch.Tensor) -> torch.Tensor:
    y: torch.Tensor = net.two(net.one(x))
    return y


def pooled(net: Net, x: torch.Tensor) -> torch.Tensor:
    """Like a model that always computes its pooler, and a task that takes the mean instead."""
    net.pooler(x)
    return never_pooled(net, x)


@pytest.mark.parametrize("route", [pooled, never_pooled])
def test_a_pooler_that_the_loss_does_not_use(
    route: Callable[[Net, torch.Tensor], torch.Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    # The user asked for it to be trained.
    net = Net(saved=("pooler",))
    net.route = route
    error = fault(net, saved=("head", "pooler"))
    assert "1 of 2 got none in the first" in str(error)
    assert ": pooler." in str(error)
    assert error.problems[0].key == "lora.modules_to_save"
    # Nobody did: the base came without it.
    net = Net(saved=("pooler",))
    net.route = route
    watch = AdapterWatch(net, ("head", "pooler"), may_be_unused=("head", "pooler"))
    with caplog.at_level(logging.WARNING, logger="lora_cli"):
        train(net, watch, steps=30)
    assert [r.getMessage() for r in caplog.records] == [
        "note: the loss does not depend on pooler, whose weights the base lacks: it is saved as "
        "it started"
    ]


def test_a_loss_past_every_new_module_is_an_error() -> None:
    net = Net()
    net.forward = lambda x: net.two(net.one(x))  # type: ignore[method-assign]
    error = fault(net, may_be_unused=("head",))
    assert "1 of 1 got none in the first 20 steps: head." in str(error)


def test_a_head_of_which_a_part_is_unused() -> None:
    net = Net()
    net.head.register_parameter("spare", nn.Parameter(torch.ones(3)))
    error = fault(net)
    assert "1 of 3 had none but zero throughout the first 20 steps: head.spare." in str(error)


def test_a_part_of_the_head_whose_gradient_is_zero() -> None:
    net = Net()
    net.head = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    nn.init.constant_(net.head[0].bias, -100.0)
    dead = "head.0.bias, head.0.weight, head.2.weight."
    assert f"3 of 4 had none but zero throughout the first 20 steps: {dead}" in str(fault(net))


def test_a_body_module_may_have_unused_parts() -> None:
    """Of what is trained whole in the body, something must learn, but not everything."""
    net = Net(saved=("one.base_layer",))
    net.one.base_layer.register_parameter("spare", nn.Parameter(torch.ones(3)))
    watch = AdapterWatch(net, ("head", "one.base_layer"))
    assert train(net, watch, steps=30) == LAST_STEP


@pytest.mark.parametrize("strategy", ["adapter", "prefix"])
def test_what_other_strategies_add(
    tiny_model_dir: ModelDir, strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = AdapterStrategyConfig(size=4) if strategy == "adapter" else PrefixStrategyConfig()
    for is_cut in (False, True):
        model = AutoModelForSequenceClassification.from_pretrained(tiny_model_dir(), num_labels=2)
        applied = apply_strategy(model, config, ("classifier",), seed=0)
        if is_cut:
            block = model.bert.encoder.layer[1]
            block.register_forward_hook(lambda _m, _i, output: output.detach())
        watch = AdapterWatch(model.train(), applied.saved)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
        ended = None
        for step in range(1, 5):
            torch.manual_seed(step)
            ids = torch.randint(5, 30, (4, 6))
            model(input_ids=ids, labels=torch.tensor([0, 1, 1, 0])).loss.backward()
            watch.look()
            optimizer.step()
            if is_cut and step == 3:
                with pytest.raises(RunFailedError, match="ran without the loss depending") as e:
                    watch.confirm(last=False)
                assert e.value.problems[0].key == "strategy"
                assert "lora.exclude" not in str(e.value)
                break
            ended = ended or watch.confirm(last=False)
            optimizer.zero_grad()
        assert is_cut != bool(ended)


@pytest.mark.parametrize("is_cut", [False, True])
def test_weights_of_the_base(is_cut: bool) -> None:
    """A pooler that is trained with the rest and not used is usual; nothing that learns is not."""
    net = Net(saved=("pooler",))
    net.one, net.two = nn.Linear(4, 4), nn.Linear(4, 4)
    net.route = lambda net, x: net.two(net.one(x)).detach() if is_cut else pooled(net, x)
    if is_cut:
        assert "all 6 beside the head had none" in str(fault(net, steps=4))
    else:
        assert train(net, AdapterWatch(net, ("head",)), steps=30) == LAST_STEP


def test_rows_of_tokens_that_have_not_occurred() -> None:
    class Rows(AdapterLayer):
        def __init__(self) -> None:
            super().__init__()
            self.base_layer = nn.Embedding(9, 4).requires_grad_(False)
            self.delta = nn.Parameter(torch.zeros(1, 4))

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.base_layer(ids) + (ids == 8)[..., None] * self.delta
            return y

    model = nn.Sequential(Rows(), nn.Linear(4, 2))
    watch = AdapterWatch(model, ("1",))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for step in range(LAST_STEP):
        optimizer.zero_grad()
        model(torch.tensor([[0, 1, 2]])).square().sum().backward()
        watch.look()
        optimizer.step()
        assert watch.confirm(last=False) == (step == LAST_STEP - 1)


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

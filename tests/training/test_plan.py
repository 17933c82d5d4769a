from dataclasses import replace

from lora_cli.config.optim import AdamWConfig, LinearConfig
from lora_cli.config.sections import TrainerConfig
from lora_cli.training.plan import Plan


def test_a_short_last_step_counts() -> None:
    plan = Plan(
        train=[{}] * 21,
        validation=[],
        trainer=TrainerConfig(epochs=3, global_batch_size=10),
        optimizer=AdamWConfig(),
        scheduler=LinearConfig(),
        seed=0,
    )
    assert (plan.steps_per_epoch, plan.total_steps) == (3, 9)
    assert [step for step in range(1, 10) if plan.is_due("epoch", step)] == [3, 6, 9]
    # After the last step whatever the period.
    assert [step for step in range(1, 10) if plan.is_due(4, step)] == [4, 8, 9]


def test_what_a_batch_holds_depends_on_seed_and_step_alone() -> None:
    plan = Plan(
        train=[{}] * 4,
        validation=[],
        trainer=TrainerConfig(global_batch_size=4),
        optimizer=AdamWConfig(),
        scheduler=LinearConfig(),
        seed=0,
    )
    other = replace(plan, trainer=replace(plan.trainer, global_batch_size=2, label_smoothing=0.1))
    seeds = {p.batch_extras(step)["seed"] for p in (plan, replace(plan, seed=1)) for step in (0, 1)}
    assert len(seeds) == 4
    assert plan.batch_extras(1) == {"seed": other.batch_extras(1)["seed"]}
    assert other.batch_extras(1)["label_smoothing"] == 0.1
    # Written down, since a run that is resumed by a later version must draw the same.
    assert plan.batch_extras(1)["seed"] == 6_096_812_863_120_040_317

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

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

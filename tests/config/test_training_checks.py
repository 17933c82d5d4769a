from typing import Any

import pytest

NAMED = ("train", "model=minilm", "task=movie_reviews")


def test_schedule_free_brings_a_constant_schedule_with_it(compose_all: Any) -> None:
    (found,) = compose_all(*NAMED, "optimizer=schedule_free", "scheduler.warmup_steps=5")
    assert (found.config.scheduler.name, found.config.scheduler.warmup_steps) == ("constant", 5)
    assert found.origins["scheduler.name"] == "default with optimizer=schedule_free"
    assert "scheduler" not in [next(iter(entry)) for entry in found.user["defaults"]]
    (chosen,) = compose_all(*NAMED, "optimizer=schedule_free", "scheduler=constant")
    assert chosen.config.scheduler.name == "constant"
    (other,) = compose_all(*NAMED, "optimizer=lion")
    assert other.config.scheduler.name == "linear"


@pytest.mark.parametrize("scheduler", ["linear", "cosine", "polynomial"])
def test_another_schedule_with_schedule_free_is_refused(problems_of: Any, scheduler: str) -> None:
    (problem,) = problems_of(*NAMED, "optimizer=schedule_free", f"scheduler={scheduler}")
    assert problem.id == "config.schedule-free"
    assert f"but is {scheduler}" in problem.message


def test_ranks_that_change_do_not_go_with_averages(problems_of: Any) -> None:
    (problem,) = problems_of(*NAMED, "optimizer=schedule_free", "lora=adalora")
    assert (problem.id, problem.key) == ("config.schedule-free", "lora.variant")
    (problem,) = problems_of(*NAMED, "trainer.ema_decay=0.99", "lora=adalora")
    assert (problem.id, problem.key) == ("config.not-read", "trainer.ema_decay")


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        (("trainer.ema_decay=0.9", "optimizer=schedule_free"), "trainer.ema_decay"),
        (
            ("trainer.gradient_checkpointing=true", "strategy=head"),
            "trainer.gradient_checkpointing",
        ),
        (
            ("trainer.gradient_checkpointing=true", "strategy=prefix"),
            "trainer.gradient_checkpointing",
        ),
        (("optimizer.weight_decay_a=0.1", "strategy=full"), "optimizer.weight_decay_a"),
        (("optimizer.weight_decay_b=0.1", "lora=vera"), "optimizer.weight_decay_b"),
        (("optimizer.weight_decay_a=0.1", "lora=lora_fa"), "optimizer.weight_decay_a"),
    ],
)
def test_what_would_have_no_effect_is_refused(
    problems_of: Any, arguments: tuple[str, ...], key: str
) -> None:
    (problem,) = problems_of(*NAMED, *arguments)
    assert (problem.id, problem.key) == ("config.not-read", key)


@pytest.mark.parametrize(
    "setting",
    [
        "trainer.ema_decay=1",
        "trainer.ema_decay=0",
        "trainer.label_smoothing=1",
        "trainer.neftune_alpha=0",
        "optimizer.weight_decay_b=-1",
    ],
)
def test_bounds(problems_of: Any, setting: str) -> None:
    (problem,) = problems_of(*NAMED, setting)
    assert problem.key == setting.partition("=")[0]


def test_a_prompt_must_have_a_place_for_the_label(problems_of: Any, compose_all: Any) -> None:
    named = ("train", "model=clip-base", "task=flickr8k")
    (problem,) = problems_of(*named, "task.zero_shot.prompt=a cat")
    assert (problem.id, problem.key) == ("config.bad-value", "task.zero_shot.prompt")
    (found,) = compose_all(*named, "task.zero_shot.prompt=a {}")
    assert found.config.task.zero_shot.prompt == "a {}"

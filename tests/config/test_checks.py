from typing import Any

import pytest

NAMED = ("train", "model=bert", "task=sst2")


@pytest.mark.parametrize(
    ("overrides", "keys"),
    [
        (["scheduler.warmup_steps=5", "scheduler.warmup_ratio=0.1"], ["scheduler.warmup_ratio"]),
        (["trainer.max_steps=5", "trainer.epochs=2"], ["trainer.epochs"]),
        (["trainer=smoke", "trainer.epochs=2"], ["trainer.epochs"]),
        (["trainer.micro_batch_size=5"], ["trainer.micro_batch_size"]),
        (["trainer.micro_batch_size=64"], ["trainer.micro_batch_size"]),
        (["run.dir=x", "run.name=y"], ["run.dir"]),
        (["run.name=a/b"], ["run.name"]),
        (["lora.targets=[]"], ["lora.targets"]),
        (["run.name=.."], ["run.name"]),
        (["run.name="], ["run.name"]),
        (["task.data.validation_split=1.5"], ["task.data.validation_split"]),
        (["task.data.validation_split=0"], ["task.data.validation_split"]),
        (
            ["task.data.validation_split=0.5", "task.data.test_split=0.5"],
            ["task.data.test_split"],
        ),
        (["run.name=a b", "trainer.micro_batch_size=5"], ["trainer.micro_batch_size", "run.name"]),
    ],
)
def test_settings_that_do_not_go_together(
    problems_of: Any, overrides: list[str], keys: list[str]
) -> None:
    assert [problem.key for problem in problems_of(*NAMED, *overrides)] == keys


@pytest.mark.parametrize(
    "overrides",
    [
        ["scheduler.warmup_steps=5"],
        ["scheduler.warmup_ratio=0.1", "scheduler.warmup_steps=null"],
        ["trainer=smoke"],
        ["trainer=smoke", "trainer.max_steps=null", "trainer.epochs=2"],
        ["trainer.micro_batch_size=8"],
        ["run.name=A-b_c.9"],
        ["task.data.validation_split=0.2", "task.data.test_split=none"],
    ],
)
def test_settings_that_go_together(compose_all: Any, overrides: list[str]) -> None:
    assert len(compose_all(*NAMED, *overrides)) == 1


def test_what_is_missing_is_named_with_the_ways_out(problems_of: Any) -> None:
    model, task = problems_of("train")
    assert (model.key, task.key) == ("model.path", "task.data.path")
    assert "minilm" in model.allowed
    assert "sst2" in task.allowed
    assert "model.path=DIR" in model.fix


@pytest.mark.parametrize("command", ["eval", "predict", "merge", "export"])
def test_a_subject_is_needed(problems_of: Any, command: str) -> None:
    (problem,) = problems_of(command)
    assert problem.key == "from"


def test_one_source_of_rows(problems_of: Any) -> None:
    (problem,) = problems_of("predict", "runs/x", "text=a", "input=b.csv")
    assert problem.key == "text"


def test_export_formats(problems_of: Any) -> None:
    (problem,) = problems_of("export", "runs/x", "format=ggml")
    assert problem.allowed == "peft, hf, onnx"

from typing import Any

import pytest

NAMED = ("train", "model=bert", "task=sst2")


@pytest.mark.parametrize(
    ("overrides", "keys"),
    [
        (["scheduler.warmup_steps=5", "scheduler.warmup_ratio=0.1"], ["scheduler.warmup_ratio"]),
        (["trainer.max_steps=5", "trainer.epochs=2"], ["trainer.epochs"]),
        (["trainer=short", "trainer.epochs=2"], ["trainer.epochs"]),
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
        ["trainer=short"],
        ["trainer=short", "trainer.max_steps=null", "trainer.epochs=2"],
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


@pytest.mark.parametrize(
    ("overrides", "keys"),
    [
        (["a", "adapters=[b,c]"], ["from"]),
        (["adapters=[b,c]"], ["output"]),
        (["adapters=[b,c]", "output=o", "weights=[1]"], ["weights"]),
        (["adapters=[b,'']", "output=o"], ["adapters"]),
        (["adapters=[]"], ["from"]),
        (["adapters=[b]", "output=o", "method=ties", "density=0"], ["density"]),
    ],
)
def test_what_is_merged(problems_of: Any, overrides: list[str], keys: list[str]) -> None:
    assert [problem.key for problem in problems_of("merge", *overrides)] == keys


def test_several_adapters_are_merged(compose_all: Any) -> None:
    (composed,) = compose_all(
        "merge", "adapters=[runs/a=b,'c, d']", "weights=[0.7,-0.3]", "output=o", "into=adapter"
    )
    assert composed.config.adapters == ("runs/a=b", "c, d")
    assert composed.config.weights == (0.7, -0.3)


def test_targets_need_a_model_and_no_rows(problems_of: Any, compose_all: Any) -> None:
    (problem,) = problems_of("targets")
    assert problem.key == "model.path"
    found = problems_of("targets", "model=minilm", "task.data.path=x", "task.max_length=9")
    assert [problem.key for problem in found] == ["task.data.path", "task.max_length"]
    assert {problem.id for problem in found} == {"config.not-read"}
    (composed,) = compose_all("targets", "model=minilm", "task=sst2", "ranks=[2,3]", "lora=dora")
    assert (composed.config.ranks, composed.config.lora.variant) == ((2, 3), "dora")
    (problem,) = problems_of("targets", "model=minilm", "model.sha256=00")
    assert problem.message == (
        "`model.sha256` must be left out, since no weights are read, but is set."
    )
    (problem,) = problems_of("targets", "model=minilm", "lora.targets=[]")
    assert problem.key == "lora.targets"


@pytest.mark.parametrize("command", ["eval", "predict", "merge", "export"])
def test_a_subject_is_needed(problems_of: Any, command: str) -> None:
    (problem,) = problems_of(command)
    assert problem.key == "from"


def test_one_source_of_rows(problems_of: Any) -> None:
    (problem,) = problems_of("predict", "runs/x", "text=a", "input=b.csv")
    assert problem.key == "text"


def test_export_formats(problems_of: Any) -> None:
    (problem,) = problems_of("export", "runs/x", "format=ggml")
    assert problem.allowed == ("peft, hf, onnx, onnx-int8, torch-export, gguf, gguf-lora, ollama")

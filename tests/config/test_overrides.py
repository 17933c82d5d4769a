from lora_cli.config.compose import parse_override
from lora_cli.config.overrides import Request, known_keys, resets, sort_overrides


def request(*overrides: str, command: str = "train", multirun: bool = False) -> Request:
    return Request(
        command=command,
        overrides=[parse_override(text, literal=False, extra=None) for text in overrides],
        multirun=multirun,
        recipe=None,
        body={},
        extra=None,
    )


def test_known_keys_are_those_of_the_chosen_variants() -> None:
    assert "optimizer.momentum" not in known_keys(request())
    assert "optimizer.momentum" in known_keys(request("optimizer=sgd"))
    both = known_keys(request("optimizer=sgd,adamw", multirun=True))
    assert {"optimizer.momentum", "optimizer.betas"} <= set(both)


def test_sound_overrides_are_kept() -> None:
    good, problems = sort_overrides(request("lora.r=4", "lora.x=1", "++seed=3", "hydra.verbose=1"))
    assert [item.key for item in good] == ["lora.r", "seed", "hydra.verbose"]
    assert [problem.key for problem in problems] == ["lora.x"]


def test_a_misspelt_section_is_corrected_with_its_setting() -> None:
    texts = ("lroa.r=4", "loora.vera.seed=1", "sed=1", "xyz.foo=1")
    _, problems = sort_overrides(request(*texts))
    assert [problem.fix for problem in problems] == [
        'did you mean "lora.r"?',
        'did you mean "lora.vera.seed"?',
        'did you mean "seed"?',
        None,
    ]
    assert all("trainer" in (problem.allowed or "") for problem in problems)


def test_only_own_data_of_train_resets_names() -> None:
    assert resets(request("task=sst2")) == {}
    assert resets(request("model=minilm")) == {}
    assert resets(request("model=minilm", "model.path=x", "model.revision=v1")) == {
        "model.sha256": None,
        "model.hub_id": None,
        "model.architecture": None,
        "model.num_layers": None,
    }
    assert resets(request("task.data.path=x", command="eval")) == {}
    found = resets(request("task.data.path=x", "task.data.name=y"))
    assert "task.data.name" not in found
    assert found["task.data.train_split"] == "train"

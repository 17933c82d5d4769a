import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_cli.config.commands import COMMANDS, TrainConfig
from lora_cli.config.decode import decode
from lora_cli.config.schema import nest, to_plain


@pytest.mark.parametrize("command", COMMANDS)
def test_defaults_survive_a_round_trip(command: str) -> None:
    config = COMMANDS[command]()
    assert decode(COMMANDS[command], to_plain(config)) == (config, [])
    assert decode(COMMANDS[command], {}) == (config, [])


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("lora.targets", "all-linear", "all-linear"),
        ("lora.targets", "query", ("query",)),
        ("lora.targets", ["q", "v"], ("q", "v")),
        ("lora.alpha", 4, 4.0),
        ("task.data.label_names", [0, 1], ("0", "1")),
        ("task.data.validation_split", 0.2, 0.2),
        ("task.data.validation_split", "dev", "dev"),
        ("trainer.eval_steps", 10, 10),
        ("trainer.eval_steps", "epoch", "epoch"),
        ("trainer.max_grad_norm", None, None),
        ("optimizer.betas", [0.8, 0.9], (0.8, 0.9)),
        ("tracker", "csv", ("csv",)),
        ("tracker", ["wandb", "csv"], ("wandb", "csv")),
        ("trainer.max_time", 3600, 3600.0),
        ("trainer.max_time", "2h", "2h"),
        ("lora.layers", 3, (3,)),
        ("lora.layers", "8-11", ("8-11",)),
        ("lora.layers", [0, -1, "top-4"], (0, -1, "top-4")),
        ("lora.rank_pattern", {}, {}),
        (
            "lora.rank_pattern",
            {"query": 4, "*.layer.0.*": 16, 0: 2},
            {"query": 4, "*.layer.0.*": 16, "0": 2},
        ),
        ("lora.alpha_pattern", {"query": 4}, {"query": 4.0}),
    ],
)
def test_values_become_what_they_mean(name: str, value: Any, expected: Any) -> None:
    config, problems = decode(TrainConfig, nest({name: value}))
    assert problems == []
    node: Any = config
    for part in name.split("."):
        node = getattr(node, part)
    assert node == expected
    assert type(node) is type(expected)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lora.r", 0),
        ("lora.r", True),
        ("lora.r", 4.0),
        ("lora.r", "4"),
        ("lora.r", None),
        ("lora.alpha", math.nan),
        ("lora.alpha", math.inf),
        ("lora.alpha", 10**400),
        ("lora.alpha", 0),
        ("lora.dropout", 1.0),
        ("lora.targets", [1.5]),
        ("lora.targets", {}),
        ("lora", 3),
        ("lora", None),
        ("model.path", 5),
        ("model.path", "a\0b"),
        ("model.dtype", "float64"),
        ("trainer.eval_steps", 0),
        ("trainer.eval_steps", "batch"),
        ("trainer.keep_checkpoints", 1),
        ("optimizer.betas", [0.9]),
        ("optimizer.betas", [0.9, 1.0]),
        ("optimizer.name", "adam"),
        ("optimizer", "adamw"),
        ("task.data.label_names", [True]),
        ("seed", 2**32),
        ("unknown", 1),
        ("lora.rank", 1),
        ("lora.layers", [1.5]),
        ("lora.layers", True),
        ("lora.layers", {}),
        ("lora.rank_pattern", None),
        ("lora.rank_pattern", 4),
        ("lora.rank_pattern", ["query"]),
        ("strategy.name", "lorra"),
        ("adapter_mode", "add"),
        ("tracker", "tensorbord"),
        ("tracker", ["csv", 3]),
        ("trainer.max_time", True),
    ],
)
def test_bad_values_are_named(name: str, value: Any) -> None:
    config, problems = decode(TrainConfig, nest({name: value}))
    assert config is None
    assert [problem.key for problem in problems] == [name]
    assert f"`{name}` must be" in problems[0].message


def test_entries_of_a_mapping_are_named() -> None:
    pattern = {"query": 0, "a.b": "x", "key": True, "value": 2, 0: None, True: 3, 1.5: 4}
    plain = {"rank_pattern": pattern, "alpha_pattern": {"query": 0.0}}
    config, problems = decode(TrainConfig, {"lora": plain})
    assert config is None
    rank = "lora.rank_pattern"
    assert [problem.key for problem in problems] == [
        *(f"{rank}.query", f"{rank}.a.b", f"{rank}.key", f"{rank}.0"),
        *(rank, rank, "lora.alpha_pattern.query"),
    ]
    assert problems[0].message == (
        "`lora.rank_pattern.query` must be a whole number of at least 1, but is 0."
    )
    assert problems[-1].message.endswith("must be a number above 0, but is 0.0.")


def test_a_mapping_keeps_its_order() -> None:
    pattern = {"b": 1, "a": 2, "*": 3}
    config, _ = decode(TrainConfig, {"lora": {"rank_pattern": pattern}})
    assert config is not None
    assert list(config.lora.rank_pattern) == ["b", "a", "*"]
    assert decode(TrainConfig, to_plain(config)) == (config, [])


@pytest.mark.parametrize(
    ("command", "name", "value", "words"),
    [
        ("train", "lora.exclude", 3, "a list of names"),
        ("train", "lora.layers", 1.5, "a list of whole numbers or names"),
        ("merge", "adapters", 3, "a list of paths"),
        ("merge", "weights", "x", "a list of numbers"),
        ("targets", "ranks", [0], "a list of whole numbers of at least 1"),
        ("train", "lora.alpha_pattern", 3, "a mapping from names to numbers above 0"),
        ("train", "tracker", ["x"], "a list of names out of tensorboard, wandb, mlflow,"),
    ],
)
def test_lists_and_mappings_in_words(command: str, name: str, value: Any, words: str) -> None:
    _, (problem,) = decode(COMMANDS[command], nest({name: value}))
    assert words in problem.message


def test_every_problem_is_found() -> None:
    _, problems = decode(TrainConfig, {"lora": {"r": 0, "rr": 1}, "seeds": 1, "run": 2})
    assert {problem.key for problem in problems} == {"lora.r", "lora.rr", "seeds", "run"}


def test_a_near_name_is_offered() -> None:
    plain = {
        "model": {"dtype": "flaot32"},
        "trainer": {"epoch": 1},
        "tracker": ["csv", "tensorbord"],
    }
    _, problems = decode(TrainConfig, plain)
    assert {problem.fix for problem in problems} == {
        'did you mean "float32"?',
        'did you mean "tensorboard"?',
        'did you mean "trainer.epochs"?',
    }


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["lora", "r", "optimizer", "name", "task", "data", "betas", "rank_pattern", "x"]
            ),
            inner,
            max_size=3,
        )
    ),
    max_leaves=10,
)


@given(st.dictionaries(st.sampled_from(["lora", "optimizer", "task", "seed"]), JSON))
def test_any_values_give_a_config_or_problems(plain: dict[str, Any]) -> None:
    config, problems = decode(TrainConfig, plain)
    assert (config is None) == bool(problems)
    if config is not None:
        assert decode(TrainConfig, to_plain(config)) == (config, [])

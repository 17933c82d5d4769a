import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from lora_cli.config.commands import VARIANTS, EvalConfig, TargetsConfig, TrainConfig
from lora_cli.config.composed import recipe_text
from lora_cli.config.derived import derived_defaults, describe_factors
from lora_cli.config.optim import AdafactorConfig, AdamWConfig, SgdConfig
from lora_cli.config.schema import all_keys, keys_of, to_plain
from lora_cli.config.strategies import LR_FACTOR, FullStrategyConfig

NAMED = ("train", "model=minilm", "task=movie_reviews")
OPTIMIZERS = {"adamw": AdamWConfig(), "sgd": SgdConfig(), "adafactor": AdafactorConfig()}


def expected(strategy: str, optimizer: str = "adamw") -> Any:
    return pytest.approx(OPTIMIZERS[optimizer].lr * LR_FACTOR[strategy], rel=1e-5)


def test_every_strategy_has_a_factor() -> None:
    assert list(LR_FACTOR) == list(VARIANTS["strategy"][1])
    assert all(factor > 0 for factor in LR_FACTOR.values())
    # The ones that the rest of this file leans on.
    assert LR_FACTOR["lora"] == 1
    assert LR_FACTOR["full"] < 0.1


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("strategy", LR_FACTOR)
def test_the_default_goes_by_the_strategy(compose_all: Any, strategy: str, optimizer: str) -> None:
    (found,) = compose_all(*NAMED, f"strategy={strategy}", f"optimizer={optimizer}")
    lr = found.config.optimizer.lr
    assert lr == expected(strategy, optimizer)
    assert type(lr) is float
    assert len(f"{lr!r}") < 10
    assert found.plain["optimizer"]["lr"] == lr
    if LR_FACTOR[strategy] == 1:
        assert "optimizer.lr" not in found.origins
    else:
        assert found.origins["optimizer.lr"] == (
            f"default of optimizer={optimizer} times {LR_FACTOR[strategy]:g}"
            f" for strategy={strategy}"
        )


def test_each_job_of_a_sweep_has_its_own(compose_all: Any) -> None:
    jobs = compose_all(*NAMED, "-m", "strategy=lora,full,prefix", "optimizer=adamw,sgd")
    assert [job.config.optimizer.lr for job in jobs] == [
        expected(strategy, optimizer)
        for strategy in ("lora", "full", "prefix")
        for optimizer in ("adamw", "sgd")
    ]


RECIPE = "defaults: [model: minilm, task: movie_reviews, strategy: full]\n"


@pytest.mark.parametrize("lr", [0.002, 7e-4])
def test_what_the_user_sets_is_left_alone(compose_all: Any, tmp_path: Path, lr: float) -> None:
    (line,) = compose_all(*NAMED, "strategy=full", f"optimizer.lr={lr}")
    assert line.config.optimizer.lr == lr
    assert line.user["optimizer"] == {"lr": lr}
    path = tmp_path / "r.yaml"
    path.write_text(f"{RECIPE}optimizer: {{lr: {lr}}}\n")
    (recipe,) = compose_all("train", str(path))
    assert recipe.config.optimizer.lr == lr
    assert recipe.origins["optimizer.lr"] == f"{path}:2"
    jobs = compose_all(*NAMED, "-m", "strategy=lora,full", f"optimizer.lr={lr}")
    assert [job.config.optimizer.lr for job in jobs] == [lr, lr]


def test_what_an_option_sets_is_left_alone(compose_all: Any, tmp_path: Path) -> None:
    options = {"slow": "lr: 1e-5\n", "same": "lr: 0.1\n", "other": "momentum: 0.5\n"}
    folder = tmp_path / "mine"
    (folder / "optimizer").mkdir(parents=True)
    for name, text in options.items():
        (folder / "optimizer" / f"{name}.yaml").write_text(f"defaults: [sgd]\n{text}")
    own = ("--config-dir", str(folder), "strategy=full")
    lrs = {
        name: compose_all(*NAMED, *own, f"optimizer={name}")[0].config.optimizer.lr
        for name in options
    }
    assert lrs == {"slow": 1e-5, "same": 0.1, "other": expected("full", "sgd")}
    (plus,) = compose_all(*NAMED, "optimizer=lora_plus", "strategy=lora_then_full")
    content = yaml.safe_load(
        (Path(__file__).parents[2] / "configs/optimizer/lora_plus.yaml").read_text()
    )
    assert plus.config.optimizer.lr == content["lr"] < AdamWConfig().lr


def test_the_written_recipe_repeats_the_run_and_leaves_the_choice_open(
    compose_all: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "mine"
    for group, text in {
        "optimizer": "defaults: [sgd]\nmomentum: 0.5\n",
        "strategy": "defaults: [full]\n",
    }.items():
        (folder / group).mkdir(parents=True)
        (folder / group / "own.yaml").write_text(text)
    own = ("--config-dir", str(folder), "optimizer=own", "strategy=own")
    for arguments, optimizer in (((*NAMED, "strategy=full"), "adamw"), ((*NAMED, *own), "sgd")):
        (first,) = compose_all(*arguments)
        assert "lr" not in first.user.get("optimizer", {})
        again = tmp_path / "again.yaml"
        again.write_text(recipe_text(first))
        (repeated,) = compose_all("train", str(again))
        assert repeated.plain == first.plain
        assert repeated.config.optimizer.lr == expected("full", optimizer)
        (changed,) = compose_all("train", str(again), "strategy=lora")
        assert changed.config.optimizer.lr == expected("lora", optimizer)


def test_what_is_shown_is_what_is_used(compose_all: Any, capsys: Any) -> None:
    assert compose_all(*NAMED, "strategy=full", "--cfg", "job") == []
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["optimizer"]["lr"] == expected("full")
    assert compose_all(*NAMED, "strategy=prefix", "--cfg", "job", "--package", "optimizer") == []
    assert yaml.safe_load(capsys.readouterr().out)["lr"] == expected("prefix")


def test_a_search_plug_in_has_its_say() -> None:
    plain = to_plain(TrainConfig(strategy=FullStrategyConfig()))
    assert list(derived_defaults("train", plain, given=())) == ["optimizer.lr"]
    assert derived_defaults("train", plain, given={"optimizer.lr"}) == {}
    swept = to_plain(TrainConfig(strategy=FullStrategyConfig(), optimizer=AdamWConfig(lr=3e-4)))
    assert derived_defaults("train", swept, given=()) == {}


@pytest.mark.parametrize(("command", "cls"), [("targets", TargetsConfig), ("eval", EvalConfig)])
def test_commands_that_do_not_train_have_none(command: str, cls: type) -> None:
    assert derived_defaults(command, to_plain(cls()), given=()) == {}


def test_the_factors_in_words() -> None:
    plain = to_plain(TrainConfig())
    (name,) = (name for name, key in keys_of("train", plain).items() if "times" in key.metadata)
    text = describe_factors(keys_of("train", plain)[name])
    for strategy, factor in LR_FACTOR.items():
        assert bool(re.search(rf"\b{strategy}\b", text)) == (factor != 1)
        assert factor == 1 or re.search(rf"\b{strategy}\b[\w|]* {factor:g}[,.]", text)
    assert describe_factors(all_keys("train")["seed"]) == ""


def test_a_bad_value_is_told_no_default_that_does_not_hold(problems_of: Any) -> None:
    (problem,) = problems_of(*NAMED, "strategy=full", "optimizer.lr=-1")
    assert problem.fix == "leave it out: the default goes by `strategy`"

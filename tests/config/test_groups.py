from pathlib import Path

from lora_cli.config.groups import (
    configs_dir,
    default_options,
    describe_option,
    group_names,
    group_options,
    list_options,
    option_origins,
    option_variant,
)


def test_the_groups_of_train() -> None:
    assert default_options("train") == {
        "model": None,
        "task": "text_classification",
        "strategy": "lora",
        "lora": "default",
        "optimizer": "adamw",
        "scheduler": "linear",
        "trainer": "default",
    }
    assert default_options("eval") == {}
    assert list(default_options("targets")) == ["model", "task", "lora"]
    assert group_names() == sorted(default_options("train"))


def test_options_of_ours_win(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    for name in ("bert", "mine"):
        (tmp_path / "model" / f"{name}.yaml").write_text("path: x\n")
    options = group_options("model", tmp_path)
    assert options["bert"] == configs_dir() / "model" / "bert.yaml"
    assert options["mine"] == tmp_path / "model" / "mine.yaml"


def test_origins_and_variants_follow_the_chain(tmp_path: Path) -> None:
    (tmp_path / "optimizer").mkdir()
    mine = tmp_path / "optimizer" / "mine.yaml"
    mine.write_text("defaults: [other]\nlr: 1\n")
    (tmp_path / "optimizer" / "other.yaml").write_text("defaults: [mine, sgd]\nlr: 2\n")
    assert option_variant("optimizer", "mine", tmp_path) == "sgd"
    assert option_origins("optimizer", "mine", tmp_path) == {"optimizer.lr": mine}
    assert option_variant("task", None) == "text_classification"
    assert option_origins("model", None) == {}


def test_descriptions_are_first_comments() -> None:
    assert describe_option(configs_dir() / "optimizer" / "sgd.yaml").startswith("Stochastic")


def test_of_many_options_some_are_listed() -> None:
    few, many = ["b", "a"], [f"model-{number}" for number in range(40)]
    assert list_options("model", few) == "b, a"
    text = list_options("model", many, like="model-39x")
    assert text.startswith("model-39, ")
    assert text.endswith(" or another of 40: lora-cli models lists them")
    assert text.count(",") == 7

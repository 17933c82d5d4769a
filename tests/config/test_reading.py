from pathlib import Path
from typing import Any

import pytest

from lora_cli.config.commands import TargetsConfig, TrainConfig
from lora_cli.config.composed import recipe_text
from lora_cli.config.reading import unread_settings
from lora_cli.config.schema import to_plain

NAMED = ("train", "model=bert", "task=sst2")
RECIPE = """
defaults:
  - model: bert
  - task: sst2
  - lora: dora
  - optimizer: lora_plus
lora:
  r: 32
  alpha: 3
  rank_pattern: {query: 4}
optimizer:
  lr: 1e-4
"""


@pytest.mark.parametrize(
    ("overrides", "keys"),
    [
        (["lora=vera", "lora.alpha=32"], ["lora.alpha"]),
        (["lora=vera", "optimizer.lora_plus_ratio=4"], ["optimizer.lora_plus_ratio"]),
        (["lora.variant=vera", "lora=pissa"], ["lora.init"]),
        (["lora=adalora", "lora.rslora=true"], ["lora.rslora"]),
        (["lora=adalora", "lora.alpha_pattern={query: 2}"], ["lora.alpha_pattern"]),
        (["lora=dora", "lora.lora_bias=true"], ["lora.lora_bias"]),
        (["lora=dora", "lora.target_parameters=[a.b]"], ["lora.target_parameters"]),
        (["lora=olora", "lora.target_parameters=[a.b]"], ["lora.target_parameters"]),
        (["lora.vera.seed=1"], ["lora.vera.seed"]),
        (["lora.eva.rows=1"], ["lora.eva.rows"]),
        (["lora=olora", "lora.pissa_niter=4"], ["lora.pissa_niter"]),
        (["strategy=full", "lora.r=4"], ["lora.r"]),
        (["strategy=bitfit", "lora.r=8"], ["lora.r"]),
        (["strategy=adapter", "lora=dora"], ["lora.variant"]),
        (["strategy=head", "optimizer=lora_plus"], ["optimizer.lora_plus_ratio"]),
        (["adapter_mode=merge"], ["adapter_mode"]),
        (["strategy=top", "lora.r=4", "lora=eva"], ["lora.r", "lora.init"]),
    ],
)
def test_what_is_not_read_is_refused(
    problems_of: Any, overrides: list[str], keys: list[str]
) -> None:
    found = problems_of(*NAMED, *overrides)
    assert {problem.key for problem in found} == set(keys)
    assert {problem.id for problem in found} == {"config.not-read"}
    assert all(problem.where and "must be left out" in problem.message for problem in found)


@pytest.mark.parametrize(
    "overrides",
    [
        ["lora=vera", "lora.vera.seed=1", "lora.dropout=0.1"],
        ["lora=dora", "lora.init=pissa", "lora.pissa_niter=4", "lora.rslora=true"],
        ["lora=lora_fa", "lora.lora_bias=true", "optimizer=lora_plus"],
        ["lora=adalora", "lora.alpha=3", "lora.adalora.every=2", "optimizer.lora_plus_ratio=2"],
        ["lora=eva", "lora.eva.rho=1", "strategy=lora_then_full"],
        ["strategy=full", "lora=default"],
        ["adapter=x", "adapter_mode=merge"],
    ],
)
def test_what_is_read_passes(compose_all: Any, overrides: list[str]) -> None:
    assert len(compose_all(*NAMED, *overrides)) == 1


def test_the_message_says_what_to_do(problems_of: Any) -> None:
    (problem,) = problems_of(*NAMED, "lora.variant=vera", "lora.alpha=32")
    assert problem.message == (
        "`lora.alpha` must be left out with lora.variant=vera, which has no such setting,"
        " but is 32.0."
    )
    assert problem.where == "command line, lora.alpha=32"
    assert problem.allowed == "with lora.variant=lora or dora or lora_fa or adalora"
    assert problem.fix == "leave lora.alpha out, or choose lora.variant=lora"
    (problem,) = problems_of(*NAMED, "strategy=full", "lora=dora")
    assert (problem.where, problem.fix) == (
        "configs/lora/dora.yaml",
        "leave lora=dora out, or choose strategy=lora",
    )


@pytest.mark.parametrize(
    ("overrides", "keys"),
    [
        (["from=a", "density=0.3"], ["density"]),
        (["from=a", "weights=[1]"], ["weights"]),
        (["adapters=[a,b]", "output=o", "density=0.3"], ["density"]),
        (["adapters=[a,b]", "output=o", "method=ties", "r=3"], ["r"]),
        (["adapters=[a,b]", "output=o", "method=svd", "majority_sign=total"], ["majority_sign"]),
        (["adapters=[a,b]", "output=o", "method=ties", "seed=3"], ["seed"]),
        (["adapters=[a,b]", "output=o", "into=adapter", "check_rows=0"], ["check_rows"]),
        (["adapters=[a]", "output=o", "into=adapter", "task.data.path=x"], ["task.data.path"]),
    ],
)
def test_settings_of_other_ways_to_merge(
    problems_of: Any, overrides: list[str], keys: list[str]
) -> None:
    assert [problem.key for problem in problems_of("merge", *overrides)] == keys


def test_defaults_are_not_held_against_anybody() -> None:
    plain = to_plain(TrainConfig())
    assert set(unread_settings("train", plain)) >= {"lora.vera.seed", "adapter_mode"}
    assert "lora.r" not in unread_settings("train", plain)
    assert "lora.r" not in unread_settings("targets", to_plain(TargetsConfig()))


def test_the_recipe_gives_way_to_the_command_line(compose_all: Any, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(RECIPE)
    (full,) = compose_all("train", str(path), "strategy=full")
    assert full.config.lora == TrainConfig().lora
    assert full.config.optimizer.lr == 1e-4
    assert full.config.optimizer.lora_plus_ratio == 1.0
    assert full.user == {
        "defaults": [{"model": "bert"}, {"task": "sst2"}, {"strategy": "full"}],
        "optimizer": {"lr": 1e-4},
    }
    assert not [name for name in full.origins if name == "lora.r"]
    (vera,) = compose_all("train", str(path), "lora.variant=vera", "optimizer=adamw")
    assert (vera.config.lora.r, vera.config.lora.alpha) == (32, 16.0)
    assert vera.config.lora.rank_pattern == {}
    for composed in (full, vera):
        again = tmp_path / "again.yaml"
        again.write_text(recipe_text(composed))
        (repeated,) = compose_all("train", str(again))
        assert repeated.config == composed.config


def test_each_job_of_a_sweep_takes_what_it_reads(compose_all: Any, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(RECIPE)
    jobs = compose_all("train", str(path), "-m", "strategy=lora,bitfit")
    assert [job.config.lora.r for job in jobs] == [32, 8]
    assert ["lora" in job.user for job in jobs] == [True, False]


def test_a_recipe_alone_must_not_contradict_itself(problems_of: Any, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(RECIPE.replace("  - lora: dora\n", "  - strategy: full\n"))
    found = problems_of("train", str(path))
    assert {problem.key: problem.where for problem in found} == {
        "lora.r": f"{path}:8",
        "lora.alpha": f"{path}:9",
        "lora.rank_pattern": f"{path}:10",
        "optimizer.lora_plus_ratio": "configs/optimizer/lora_plus.yaml",
    }
    assert all(problem.id == "config.not-read" for problem in problems_of("train", str(path)))


def test_what_the_command_line_adds_to_a_recipe_is_read(problems_of: Any, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(RECIPE)
    (problem,) = problems_of("train", str(path), "strategy=full", "lora.r=4")
    assert problem.key == "lora.r"


def test_an_option_of_ones_own_is_written_out_as_far_as_it_is_read(
    compose_all: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "mine"
    (folder / "lora").mkdir(parents=True)
    (folder / "lora" / "small.yaml").write_text("r: 2\nrank_pattern: {query: 1}\n")
    (first,) = compose_all(*NAMED, "--config-dir", str(folder), "lora=small")
    assert first.user["lora"]["rank_pattern"] == {"query": 1}
    assert "vera" not in first.user["lora"]
    again = tmp_path / "again.yaml"
    again.write_text(recipe_text(first))
    (repeated,) = compose_all("train", str(again))
    assert repeated.config == first.config


def test_what_is_not_read_is_told_beside_a_name_that_does_not_exist(problems_of: Any) -> None:
    checkpointing = "trainer.gradient_checkpointing=true"
    found = problems_of(*NAMED, "strategy=head", checkpointing, "optimizer=lion", "optimizer.eps=1")
    assert [(problem.id, problem.key) for problem in found] == [
        ("config.unknown-key", "optimizer.eps"),
        ("config.not-read", "trainer.gradient_checkpointing"),
    ]


@pytest.mark.parametrize("wrong", ["lora.inti=pissa", "loar=pissa"])
def test_a_choice_that_was_misspelled_is_the_only_mistake(problems_of: Any, wrong: str) -> None:
    found = problems_of(*NAMED, wrong, "lora.pissa_niter=4")
    assert [problem.key for problem in found] == [wrong.partition("=")[0]]

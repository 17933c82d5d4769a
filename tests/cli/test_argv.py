from pathlib import Path

import pytest

from lora_cli.cli.argv import COMMANDS_OF_FLAG, split
from lora_cli.config.commands import COMMANDS
from lora_cli.errors import UserError


def test_our_flags_are_taken_off() -> None:
    line = split(["train", "--json", "lora.r=4", "--resume", "-m", "model=bert"])
    assert line.command == "train"
    assert (line.options.json, line.options.resume, line.options.overwrite) == (True, True, False)
    assert line.overrides == ("lora.r=4", "model=bert")
    assert line.hydra_flags == ("--multirun",)


def test_flags_before_the_command() -> None:
    line = split(["--debug", "eval", "runs/x"])
    assert (line.command, line.options.debug) == ("eval", True)
    assert line.overrides == ("from='runs/x'",)


def test_flags_of_hydra_keep_their_values() -> None:
    line = split(["train", "--cfg=job", "-p", "lora", "--resolve", "-cd", "x", "a=b"])
    assert line.hydra_flags == (
        *("--cfg", "job", "--package", "lora", "--resolve", "--config-dir", "x"),
    )
    assert split(["train", "--info", "a=b"]).hydra_flags == ("--info", "all")
    assert line.overrides == ("a=b",)
    assert split(["train", "--info", "plugins"]).hydra_flags == ("--info", "plugins")


@pytest.mark.parametrize(
    ("arguments", "wants"),
    [
        ([], "help"),
        (["--help"], "help"),
        (["train", "-h"], "help"),
        (["train", "x.yaml", "--version"], "version"),
        (["--shell-completion", "install=bash"], "completion"),
        (["-sc", "query=bash"], "completion"),
    ],
)
def test_what_is_asked_for_instead(arguments: list[str], wants: str) -> None:
    assert split(arguments).wants == wants


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("flag", COMMANDS_OF_FLAG)
def test_flags_that_a_command_does_not_read_are_refused(command: str, flag: str) -> None:
    given = [flag, "x", "--config-dir", "y"] if flag == "--config-name" else [flag]
    if command in COMMANDS_OF_FLAG[flag]:
        assert split([command, *given]).command == command
        return
    with pytest.raises(UserError, match=rf"`{flag}` must be left out of `lora-cli {command}`"):
        split([command, *given])


@pytest.mark.parametrize(
    "flags", [["--cfg", "job", "-m"], ["--info", "-m"], ["--cfg", "job", "--info"], ["--resolve"]]
)
def test_flags_that_do_not_go_together(flags: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        split(["train", *flags])
    assert caught.value.problems[0].id == "cli.bad-flag"


def test_the_model_of_targets_is_a_setting() -> None:
    for subject, fix in (("bert", "model=bert"), ("./bert", "model.path=./bert")):
        with pytest.raises(UserError) as caught:
            split(["targets", subject])
        assert caught.value.problems[0].fix == f"lora-cli targets {fix}"


def test_texts_are_quoted_and_null_is_not() -> None:
    line = split(["train", "run.dir=/tmp/a=b", "++run.name=it's", "model.path=null", "lora.r=4"])
    assert line.overrides == (
        "run.dir='/tmp/a=b'",
        "++run.name='it\\'s'",
        "model.path=null",
        "lora.r=4",
    )


def test_lists_of_paths_and_mappings_are_quoted() -> None:
    line = split(["merge", "adapters=[a b,c=d]", "weights=[1,2]", "adapters=null"])
    assert line.overrides == ("adapters=['a b','c=d']", "weights=[1,2]", "adapters=null")
    line = split(["train", 'lora.rank_pattern={"q[kv]": 1}', "lora.targets=[a,b]"])
    assert line.overrides == (r"lora.rank_pattern={q\[kv\]: 1}", "lora.targets=[a,b]")


def test_a_recipe_is_the_subject_of_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a=b.yaml", "lora.r=4", "plain.yaml"):
        Path(name).touch()
    assert split(["train", "a=b.yaml"]).recipe == Path("a=b.yaml")
    assert split(["train", "plain.yaml", "lora.r=4"]).recipe == Path("plain.yaml")
    line = split(["train", "lora.r=4"])
    assert (line.recipe, line.overrides) == (None, ("lora.r=4",))
    named = split(["train", "--config-dir", "x", "--config-name", "y"])
    assert named.recipe == Path("x/y.yaml")
    assert named.hydra_flags == ("--config-dir", "x")


@pytest.mark.parametrize(
    ("arguments", "identity"),
    [
        (["trian"], "cli.unknown-command"),
        (["lora.r=4"], "cli.unknown-command"),
        (["train", "--jsno"], "cli.unknown-flag"),
        (["train", "--json=1"], "cli.bad-flag"),
        (["train", "--experimental-rerun", "x"], "cli.unknown-flag"),
        (["train", "--config-path", "x"], "cli.unknown-flag"),
        (["train", "--cfg"], "cli.bad-flag"),
        (["train", "--cfg", "jobs"], "cli.bad-flag"),
        (["train", "--config-name", "x"], "cli.bad-flag"),
        (["train", "none.yaml"], "recipe.not-found"),
        (["eval", "a", "b"], "cli.second-subject"),
        (["targets", "a"], "cli.needless-subject"),
        (["train", "lora.alpha_pattern={a:1,a:2}"], "config.repeated"),
    ],
)
def test_bad_lines(arguments: list[str], identity: str) -> None:
    with pytest.raises(UserError) as caught:
        split(arguments)
    assert [problem.id for problem in caught.value.problems] == [identity]

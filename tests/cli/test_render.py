import json
from typing import Any

from lora_cli.cli.render import as_json, layout, layout_all, show_line, show_problems
from lora_cli.errors import Problem

FULL = Problem(
    id="lora.unmatched-target",
    message='`lora.targets` must name layers of the model, but "qurey" matches none.',
    key="lora.targets",
    where="recipes/sst2-bert.yaml:14",
    allowed="query, key, value, dense",
    fix='did you mean "query"?\nlora-cli train --help',
)
TEXT = """\
error[lora.unmatched-target]: `lora.targets` must name layers of the model, but "qurey" matches none.
  set in:   recipes/sst2-bert.yaml:14
  allowed:  query, key, value, dense
  fix:      did you mean "query"?
            lora-cli train --help"""  # noqa: E501


def test_the_four_parts() -> None:
    assert layout(FULL) == TEXT


def test_only_a_place_where_a_setting_was_given_is_one_that_it_was_set_in() -> None:
    def label(where: str, key: str | None) -> str:
        shown = layout(Problem(id="a.b", message="No.", key=key, where=where))
        return shown.splitlines()[1].removesuffix(where).strip()

    for where in ("command line, a=b", "r.yaml:3", "configs/model/bert.yaml"):
        assert (label(where, "a"), label(where, None)) == ("set in:", "where:")
    for where in ("runs/x", "rows with id 3, 4", "train.jsonl row 2"):
        assert label(where, "a") == "where:"


def test_absent_parts_are_left_out() -> None:
    assert layout(Problem(id="a.b", message="No.", fix="yes")) == "error[a.b]: No.\n  fix:      yes"


def test_several_problems() -> None:
    problem = Problem(id="a.b", message="No.")
    assert layout_all([problem, problem]) == "error[a.b]: No.\n\nerror[a.b]: No."
    text = layout_all([problem] * 25)
    assert text.count("error[") == 20
    assert text.endswith("... and 5 more")


def test_control_characters_do_not_reach_the_terminal() -> None:
    assert "\x1b" not in layout(Problem(id="a.b", message="\x1b[2J", where="\x1b]0;x\x07"))


def test_errors_go_to_stderr_without_wrapping_or_markup(capsys: Any) -> None:
    long = "x" * 300 + " [bold]"
    show_problems([Problem(id="a.b", message=long)])
    show_line("[red]")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == f"error[a.b]: {long}\n[red]\n"


def test_colour_only_where_it_is_wanted(capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    show_problems([FULL])
    assert "\x1b[" in capsys.readouterr().err
    monkeypatch.setenv("NO_COLOR", "1")
    show_problems([FULL])
    assert "\x1b[31m" not in capsys.readouterr().err


def test_json() -> None:
    assert json.loads(as_json([FULL], 2)) == {
        "error": [
            {
                "id": FULL.id,
                "message": FULL.message,
                "key": FULL.key,
                "set_in": FULL.where,
                "allowed": FULL.allowed,
                "fix": FULL.fix,
            }
        ],
        "exit_code": 2,
    }

"""What a terminal shows, and what a pipe gets instead."""

import io
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr

import pytest

from lora_cli.cli.terminal import Terminal
from lora_cli.training.events import (
    CheckpointDue,
    EvalDone,
    EvalProgress,
    EvalStarted,
    Event,
    Progress,
    RunEnded,
    RunStarted,
    StepDone,
    TrainState,
)

EVENTS: list[Event] = [
    RunStarted(0, 4, 2, 1234),
    EvalStarted(0, 10),
    EvalProgress(10),
    EvalDone(0, {"accuracy": 0.5, "loss": 0.7}, "accuracy", False),
    StepDone(1, 0.5, 0.61234, 5e-4, 2.0, 99.6, True),
    StepDone(2, 1.0, 0.5, 4e-4, 2.0, 100.0, False),
    CheckpointDue(TrainState(Progress(), {}, {})),
    EvalDone(2, {"accuracy": 0.75}, "accuracy", True),
    RunEnded(2, "finished", 3.4, 123.4),
]


class Tty(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "COLORTERM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")


@contextmanager
def fake_tty() -> Iterator[Tty]:
    """Within the test, since pytest puts its own stream in place when the test begins."""
    with redirect_stderr(Tty()) as stream:
        yield stream


def make(*, as_json: bool = False, quiet: bool = False) -> Terminal:
    return Terminal(as_json=as_json, quiet=quiet)


def test_a_pipe_gets_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    terminal = make()
    for event in EVENTS:
        terminal.on_event(event)
    assert list(terminal.track("encode", range(5000))) == list(range(5000))
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "training: 1,234 rows, 2 steps an epoch, 4 steps in all",
        "eval before training: accuracy 0.5000  loss 0.7000",
        "step 1/4  epoch 0.50  loss 0.6123  lr 5.00e-04  100 samples/s",
        "eval step 2: accuracy 0.7500  (best so far)",
        "finished at step 2 after 3 s, 123 samples/s while training",
    ]


def test_long_lines_are_not_folded(capsys: pytest.CaptureFixture[str]) -> None:
    make().note("x" * 500)
    assert capsys.readouterr().err == "x" * 500 + "\n"


@pytest.mark.usefixtures("terminal_settings")
def test_bars_move_on_a_terminal() -> None:
    with fake_tty() as stream:
        terminal = make()
        for event in EVENTS[:-1]:
            terminal.on_event(event)
        terminal.on_event(StepDone(3, 1.5, 0.25, 3e-4, 2.0, 50.0, True))
        terminal.close()
        terminal.close()
    text = stream.getvalue()
    plain = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", text)
    assert re.search(r"train .* 3/4 \S+ left loss", plain)
    assert "loss 0.2500  lr 3.00e-04  50 samples/s" in plain
    table = [line for line in plain.splitlines() if re.match(r" *(step|0|2)  ", line)]
    # A column appears when a metric does; the loss is that of the last step.
    assert table == [
        "  step   epoch  train loss  accuracy    loss",
        "     0                        0.5000  0.7000",
        "  step   epoch  train loss  accuracy",
        "     2    1.00      0.5000    0.7500  best",
    ]
    assert "step 1/4" not in plain
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1  # the cursor is shown again


@pytest.mark.usefixtures("terminal_settings")
def test_many_items_get_a_bar() -> None:
    with fake_tty() as stream:
        assert list(make().track("encode train", range(3000))) == list(range(3000))
    assert "encode train" in stream.getvalue()
    assert "3000/3000" in stream.getvalue()
    with fake_tty() as stream:
        assert list(make().track("few", range(10))) == list(range(10))
    assert stream.getvalue() == ""


@pytest.mark.usefixtures("terminal_settings")
@pytest.mark.parametrize("no_color", [False, True])
def test_no_color_is_respected(no_color: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if no_color:
        monkeypatch.setenv("NO_COLOR", "1")
    with fake_tty() as stream:
        terminal = make()
        for event in EVENTS[:5]:
            terminal.on_event(event)
        terminal.close()
    codes = re.findall(r"\x1b\[([\d;]*)m", stream.getvalue())
    colours = {code for code in codes if re.search(r"(^|;)(3[0-8]|9[0-7])", code)}
    assert bool(colours) != no_color


HOSTILE = ["[bold red]x[/]", "[/]", "a\\", ":fire:", "[link=file:///etc/passwd]x[/link]"]


@pytest.mark.parametrize("text", HOSTILE)
def test_labels_are_shown_as_they_are(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    terminal = make()
    terminal.table(text, ["class", text], [[text, "1"]])
    terminal.note(text)
    out, err = capsys.readouterr()
    assert out.count(text) == 3
    assert err == text + "\n"


def test_a_label_cannot_write_codes(capsys: pytest.CaptureFixture[str]) -> None:
    terminal = make()
    terminal.table("t", ["c"], [["x\x1b[2J\ry"]])
    terminal.note("x\x1b]0;title\x07")
    out, err = capsys.readouterr()
    assert "\x1b" not in out + err
    assert "x\\x1b[2J\\ry" in out


def test_columns_are_aligned(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [["base", "0.5", "1"], ["a long name 日本", "0.25", "12,345"]]
    make().table("scores", ["model", "accuracy", "rows"], rows)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert lines[0].strip() == "scores"
    from rich.cells import cell_len

    body = [lines[1], *lines[3:]]
    assert len({cell_len(line.rstrip()) for line in body}) == 1  # right-aligned to the same edge
    assert all(
        line.startswith(f" {name}") for line, name in zip(lines[3:], ("base", "a"), strict=True)
    )
    ends = [
        cell_len(line[: line.index(word) + len(word)])
        for line, word in zip(body, ("accuracy", "0.5", "0.25"), strict=True)
    ]
    assert len(set(ends)) == 1


def test_a_wide_table_keeps_its_width_in_a_pipe(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    names = [f"metric_number_{number}" for number in range(8)]
    make().table("t", names, [["0.1234"] * 8])
    out = capsys.readouterr().out
    assert all(name in out for name in names)


def test_json_leaves_stdout_to_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    terminal = make(as_json=True)
    terminal.note("a note")
    terminal.table("t", ["c"], [["cell"]])
    terminal.result({"label": "ärger", "x": 1})
    out, err = capsys.readouterr()
    assert json.loads(out) == {"label": "ärger", "x": 1}
    assert out.count("\n") == 1
    assert "a note" in err
    assert "cell" in err


def test_without_json_there_is_no_object(capsys: pytest.CaptureFixture[str]) -> None:
    make().result({"x": 1})
    make().output("line")
    assert capsys.readouterr() == ("line\n", "")


def test_quiet_shows_results_only(capsys: pytest.CaptureFixture[str]) -> None:
    terminal = make(quiet=True, as_json=True)
    for event in EVENTS:
        terminal.on_event(event)
    terminal.note("x")
    terminal.table("t", ["c"], [["x"]])
    terminal.output("line")
    terminal.result({"x": 1})
    assert capsys.readouterr() == ('line\n{"x": 1}\n', "")


def test_a_table_in_a_pipe_is_not_padded(capsys: pytest.CaptureFixture[str]) -> None:
    for is_result in (True, False):
        make().table("t", ["run", "reason"], [["a", ""], ["b", "why"]], is_result=is_result)
    for text in capsys.readouterr():
        lines = text.splitlines()
        assert lines[0] == "t"
        assert any(line.split() == ["b", "why"] for line in lines)
        assert [line for line in lines if line != line.rstrip()] == []

import errno
import json
import signal
import sys
import types
from typing import Any

import pytest

from lora_cli.cli.main import main
from lora_cli.errors import Interrupted, Problem, RunFailedError, StoppedError
from lora_cli.log import logger

PREDICT = ["predict", "runs/x", "text=a"]


@pytest.fixture
def fake_command(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Put a function in the place of the predict command, which is imported when called."""

    def install(function: Any) -> None:
        module = types.ModuleType("lora_cli.commands.predict")
        module.run = function  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "lora_cli.commands.predict", module)

    return install


def raising(error: BaseException) -> Any:
    def run(*arguments: Any) -> int:
        raise error

    return run


def test_a_command_gets_config_options_and_display(fake_command: Any, capsys: Any) -> None:
    seen: list[Any] = []

    def run(composed: Any, options: Any, display: Any) -> int:
        seen.extend([composed.config.text, options.json])
        logger.info("a message")
        display.result({"x": 1})
        return 1

    fake_command(run)
    assert main([*PREDICT, "--json"]) == 1
    assert seen == ["a", True]
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"x": 1}
    assert captured.err == "a message\n"


def test_quiet_hides_messages(fake_command: Any, capsys: Any) -> None:
    def run(*arguments: Any) -> int:
        logger.info("hidden")
        logger.warning("shown")
        return 0

    fake_command(run)
    assert main([*PREDICT, "--quiet"]) == 0
    assert capsys.readouterr().err == "shown\n"
    assert logger.handlers == []


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (RunFailedError(Problem(id="a.b", message="No.")), 1, "error[a.b]: No."),
        (StoppedError(Problem(id="a.b", message="Stop.")), 75, "error[a.b]: Stop."),
        (OSError(errno.ENOSPC, "No space left", "/x"), 74, "error[io.failed]"),
        (OSError(errno.EROFS, "Read-only"), 74, "error[io.failed]"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (ValueError("oops"), 70, "ValueError: oops"),
        (OSError(errno.EPERM, "odd"), 74, "error[io.failed]"),
        (OSError(errno.EINVAL, "odd"), 70, "--debug"),
        (OSError(errno.ENAMETOOLONG, "long", "x" * 300), 2, "error[io.long-name]"),
    ],
)
def test_whatever_happens_becomes_a_code_and_a_text(
    fake_command: Any, capsys: Any, error: BaseException, code: int, text: str
) -> None:
    fake_command(raising(error))
    assert main(PREDICT) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert text in captured.err
    assert "Traceback" not in captured.err
    assert main([*PREDICT, "--debug"]) == code
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(("number", "sent"), [(signal.SIGINT, []), (signal.SIGTERM, [15])])
def test_a_signal_ends_the_process_once_everything_is_put_away(
    fake_command: Any, capsys: Any, monkeypatch: Any, number: int, sent: list[int]
) -> None:
    found: list[int] = []
    monkeypatch.setattr(signal, "raise_signal", found.append)
    fake_command(raising(Interrupted(number)))
    assert main(PREDICT) == 128 + number
    assert found == sent
    assert "interrupted: nothing new was saved" in capsys.readouterr().err


def test_errors_as_json(fake_command: Any, capsys: Any) -> None:
    assert main(["predict", "--json", "batch_size=0", "txet=a"]) == 2
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert found["exit_code"] == 2
    assert {item["key"] for item in found["error"]} == {"batch_size", "txet"}
    assert {item["set_in"] for item in found["error"]} == {
        "command line, batch_size=0",
        "command line, txet=a",
    }
    assert "error[config.unknown-key]" in captured.err
    fake_command(raising(ValueError("oops")))
    assert main([*PREDICT, "--json"]) == 70
    assert json.loads(capsys.readouterr().out)["error"][0]["id"] == "internal"


def test_help_and_version(capsys: Any) -> None:
    assert main([]) == 0
    assert "usage: lora-cli COMMAND" in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("lora-cli ")
    assert main(["merge", "--help"]) == 0
    assert "check_rows" in capsys.readouterr().out

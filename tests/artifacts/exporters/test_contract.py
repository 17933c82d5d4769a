"""What every exporter may rely on."""

import logging
import sys
import warnings

import pytest

from lora_cli.artifacts.exporters.contract import check_packages, first_line, quiet
from lora_cli.errors import UserError


def test_packages_that_are_missing_are_named() -> None:
    check_packages(("json",), extra="export", needed_by="x", key="format")
    with pytest.raises(UserError) as caught:
        check_packages(("json", "no_such_thing"), extra="gguf", needed_by="x", key="format")
    (problem,) = caught.value.problems
    assert problem.message == (
        "x needs the packages json, no_such_thing, but no_such_thing cannot be imported."
    )
    assert problem.fix == 'pip install "lora-cli[gguf]"'


def test_quiet_is_quiet_and_ends(capfd: pytest.CaptureFixture[str]) -> None:
    with quiet():
        sys.stdout.write("a")
        sys.stderr.write("b")
        warnings.warn("c", stacklevel=1)
        logging.getLogger("d").error("d")
    assert capfd.readouterr() == ("", "")
    assert logging.root.manager.disable == 0
    with pytest.warns(UserWarning, match="e"):
        warnings.warn("e", stacklevel=1)


def test_first_line() -> None:
    assert first_line(ValueError("a\nb")) == "a"
    assert first_line(ValueError()) == "ValueError"
    assert len(first_line(ValueError("x" * 1000))) == 300

from typing import Any

import pytest

from lora_cli.cli.completion import complete


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("lora-cli", {"train", "eval"}),
        ("lora-cli tr", {"train"}),
        ("lora-cli train model=b", {"model=bert", "model=bert-base-chinese"}),
        ("lora-cli train x.yaml --json lora.al", {"lora.alpha="}),
        ("lora-cli eval runs/x sp", {"split="}),
        ("lora-cli nonsense lora", set()),
        ("lora-cli train model=bert [", set()),
    ],
)
def test_the_shell_is_answered(
    line: str, expected: set[str], monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.setenv("COMP_LINE", line)
    assert complete(["query=bash"]) == 0
    captured = capsys.readouterr()
    assert expected <= set(captured.out.split())
    assert bool(expected) or not captured.out.strip()
    assert captured.err == ""


def test_the_script_is_for_lora_cli(capsys: Any) -> None:
    assert complete(["install=bash"]) == 0
    assert capsys.readouterr().out.strip().endswith("lora-cli")

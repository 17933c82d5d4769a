"""Free memory: the smaller of what the machine has and what the group of processes may take."""

from pathlib import Path

import pytest

from lora_cli.commands import free_memory as module
from lora_cli.commands.free_memory import free_memory


def test_this_machine_says_something() -> None:
    found = free_memory()
    assert found is not None
    assert found > 0


def test_the_smallest_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meminfo, limit, used = (tmp_path / name for name in ("meminfo", "max", "current"))
    monkeypatch.setattr(module, "_MEMINFO", meminfo)
    monkeypatch.setattr(module, "_GROUPS", ((limit, used),))
    assert free_memory() is None
    meminfo.write_text("MemTotal: 9 kB\nMemAvailable: 5 kB\n")
    assert free_memory() == 5 * 1024
    limit.write_text("max\n")
    used.write_text("1000\n")
    assert free_memory() == 5 * 1024
    limit.write_text("4000\n")
    assert free_memory() == 3000
    used.write_text("9000\n")
    assert free_memory() == 0

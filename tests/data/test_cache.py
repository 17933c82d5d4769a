from pathlib import Path

import pytest

from lora_cli.data.cache import cache_folder


def test_variables_name_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == tmp_path / "home" / ".cache" / "lora-cli"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "shared"))
    assert cache_folder() == tmp_path / "shared" / "lora-cli"
    monkeypatch.setenv("LORA_CLI_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"

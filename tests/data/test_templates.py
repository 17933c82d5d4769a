from pathlib import Path

import pytest

from lora_cli.config.paths import absolute_path
from lora_cli.data.templates import BUILT_IN, TEMPLATE_KEY, read_template
from lora_cli.errors import UserError


def test_a_template_is_read_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "own.jinja"
    path.write_text("{{ messages }} ü", encoding="utf-8")
    assert read_template(path) == "{{ messages }} ü"
    path.write_text(" \n")
    large = tmp_path / "large"
    large.write_bytes(b"a" * ((1 << 20) + 1))
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\x00")
    for wrong in (path, large, binary, tmp_path / "none", tmp_path):
        with pytest.raises(UserError) as caught:
            read_template(wrong)
        assert caught.value.problems[0].id == "chat.no-such-template"


@pytest.mark.parametrize("name", BUILT_IN)
def test_names_of_our_own_are_no_paths(name: str, tmp_path: Path) -> None:
    assert absolute_path(TEMPLATE_KEY, name, tmp_path) == name
    assert absolute_path(TEMPLATE_KEY, f"{name}.jinja", tmp_path) == str(tmp_path / f"{name}.jinja")

"""Where results go, and which base is the one of the training."""

from dataclasses import replace
from pathlib import Path

import pytest

from lora_cli.artifacts.adapter import AdapterRecord, Subject
from lora_cli.commands.locating import check_base, check_base_settings, check_base_weights
from lora_cli.errors import UserError
from lora_cli.models.sources import ModelSource

SOURCE = ModelSource(Path("base"), "base", None, "abc", settings={"config.json": "1"})
RECORD = AdapterRecord(config={}, state={}, base={"name": "b", **SOURCE.hashes}, metrics={})
SUBJECT = Subject(adapter=Path("a"), run=None)


def test_the_base_of_the_training_passes() -> None:
    check_base(SOURCE, RECORD, SUBJECT)


@pytest.mark.parametrize(
    ("other", "check", "finding"),
    [
        (replace(SOURCE, sha256="xyz"), check_base_weights, "has others"),
        (
            replace(SOURCE, settings={"config.json": "2"}),
            check_base_settings,
            "another config.json",
        ),
    ],
)
def test_another_one_does_not(other: ModelSource, check: object, finding: str) -> None:
    for refuse in (check, check_base):
        with pytest.raises(UserError, match=finding):
            refuse(other, RECORD, SUBJECT)  # type: ignore[operator]

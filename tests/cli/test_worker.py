import json
from pathlib import Path
from typing import Any

import pytest

from lora_cli.cli import worker
from lora_cli.commands.launching import JOB, write_job
from lora_cli.commands.options import Options
from lora_cli.config.commands import TrainConfig
from lora_cli.config.composed import Composed
from lora_cli.config.schema import to_plain
from lora_cli.errors import Problem, UserError
from lora_cli.ranks import LAUNCH_FOLDER, LostError


@pytest.mark.parametrize(
    ("ends_with", "returned", "noted"),
    [
        (0, 0, 0),
        (UserError(Problem(id="a.b", message="`a` must be b, but is c.")), 0, 2),
        (OSError(28, "No space left on device"), 0, 74),
        (KeyboardInterrupt(), 0, 130),
        # Another start may help against these.
        (LostError([1], timeout=1, is_hung=False), 1, 1),
        (ZeroDivisionError("odd"), 1, 70),
    ],
)
def test_a_note_says_how_it_ended(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    ends_with: Any,
    returned: int,
    noted: int,
) -> None:
    config = TrainConfig()
    composed = Composed(
        command="train", config=config, plain=to_plain(config), user={}, choices={}, origins={}
    )
    write_job(tmp_path / JOB, composed, Options())

    def run(found: Composed, options: Options, display: object) -> int:
        assert found.config == config
        if isinstance(ends_with, BaseException):
            raise ends_with
        return int(ends_with)

    monkeypatch.setattr("lora_cli.commands.train.run", run)
    monkeypatch.setenv(LAUNCH_FOLDER, str(tmp_path))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert worker.main(tmp_path / JOB) == returned
    note = json.loads((tmp_path / "outcome-0.json").read_bytes())
    assert note["exit_code"] == noted
    assert ("lost" in note) == isinstance(ends_with, LostError)
    assert (tmp_path / "started-0.json").is_file()

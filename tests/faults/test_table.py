"""The table of `make faults`."""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from table import table, total
from tally import Tally


def test_counts_are_added_up_by_suite() -> None:
    found = [
        Tally("12 locks", trials=3, tracebacks=1),
        Tally("2 errors", trials=5, lost=1, mutants=2, killed=1),
        Tally("2 errors", trials=7, undetected=4, mutants=1, killed=1),
    ]
    rows = total(json.dumps(asdict(tally)) for tally in found)
    assert table(rows).splitlines()[2:] == [
        "| 2 errors | 12 | 1 | 0 | 4 | 0 | 2 of 3 |",
        "| 12 locks | 3 | 0 | 0 | 0 | 1 |  |",
        "| all | 15 | 1 | 0 | 4 | 1 | 2 of 3 |",
    ]


@pytest.mark.parametrize("name", ["lost", "wrong_resumes", "undetected", "tracebacks", "mutants"])
def test_what_went_wrong_is_reported_and_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("FAULTS_TALLY", str(tmp_path / "tally"))
    with pytest.raises(AssertionError):
        Tally("1 kills", trials=2, **{name: 1}).check()
    assert json.loads((tmp_path / "tally").read_text())[name] == 1
    with pytest.raises(AssertionError):
        Tally("1 kills").check()
    Tally("1 kills", trials=2).check()

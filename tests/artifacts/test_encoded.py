import hashlib
import json
import multiprocessing
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from lora_cli.artifacts import encoded
from lora_cli.artifacts.encoded import (
    EncodedRows,
    encoded_path,
    only_writer,
    read_encoded,
    write_encoded,
)

ROWS = [{"id": "1", "ids": [1, 2]}, {"id": "二", "ids": []}, {"id": "3", "ids": [-1]}]
LINES = [json.dumps(row, ensure_ascii=False).encode() for row in ROWS]


def test_rows_come_back_by_place_and_slice(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    assert read_encoded(path) is None
    written = write_encoded(path, iter(LINES))
    for rows in (written, EncodedRows(path)):
        assert len(rows) == 3
        assert list(rows) == ROWS
        assert [rows[n] for n in (0, 1, 2, -1)] == [*ROWS, ROWS[-1]]
        assert rows[1:] == ROWS[1:]
        assert rows[::-1] == ROWS[::-1]
        with pytest.raises(IndexError):
            rows[3]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [path]


def test_no_rows_and_parts_of_any_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(write_encoded(tmp_path / "none.jsonl", iter(()))) == []
    for size in (1, 2, 7, 25, 1000):
        monkeypatch.setattr(encoded, "_PART", size)
        assert list(write_encoded(tmp_path / "a.jsonl", iter(LINES))) == ROWS


def test_a_damaged_file_is_never_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "a.jsonl"
    write_encoded(path, iter(LINES))
    content = path.read_bytes()
    damaged = [content[:end] for end in range(1, len(content))]
    damaged += [
        content[:n] + bytes([content[n] ^ 1 << bit]) + content[n + 1 :]
        for n in range(len(content))
        for bit in range(8)
    ]
    for bad in [*damaged, content + b"x", content + b"\n", content * 2, b"\n", b"\0"]:
        path.write_bytes(bad)
        assert read_encoded(path) is None
        assert not path.exists()
    assert "is encoded again, since it is not as it was written" in caplog.text


def test_a_row_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def lines() -> Iterator[bytes]:
        yield LINES[0]
        raise KeyError("row 2")

    with pytest.raises(KeyError, match="row 2"):
        write_encoded(tmp_path / "a.jsonl", lines())
    assert list(tmp_path.iterdir()) == []


def test_what_was_not_used_for_long_goes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, name in enumerate("abc"):
        write_encoded(tmp_path / f"{name}.jsonl", iter(LINES))
        os.utime(tmp_path / f"{name}.jsonl", (1000 + number, 1000 + number))
    size = (tmp_path / "a.jsonl").stat().st_size
    assert read_encoded(tmp_path / "a.jsonl") is not None  # used just now
    monkeypatch.setattr(encoded, "_MOST_BYTES", 2 * size)
    write_encoded(tmp_path / "d.jsonl", iter(LINES))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "d.jsonl"]
    # The newest stays, however large.
    monkeypatch.setattr(encoded, "_MOST_BYTES", 1)
    assert list(write_encoded(tmp_path / "e.jsonl", iter(LINES))) == ROWS
    assert [path.name for path in tmp_path.iterdir()] == ["e.jsonl"]


def test_the_file_ends_with_the_hash_of_its_rows(tmp_path: Path) -> None:
    write_encoded(tmp_path / "a.jsonl", iter(LINES))
    *lines, last = (tmp_path / "a.jsonl").read_bytes().splitlines(keepends=True)
    assert json.loads(last) == {"sha256": hashlib.sha256(b"".join(lines)).hexdigest()}


def count(path: Path, log: Path) -> None:
    with only_writer(path):
        if read_encoded(path) is None:
            with log.open("a") as file:
                file.write("written\n")
            write_encoded(path, iter(LINES))


def test_one_of_several_processes_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_CLI_CACHE", str(tmp_path / "cache"))
    path, log = encoded_path("f" * 64), tmp_path / "log"
    assert path.is_relative_to(tmp_path)
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=count, args=(path, log)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert log.read_text() == "written\n"
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700

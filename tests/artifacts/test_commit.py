"""Folders that are whole or not there: faults are injected at every call that writes."""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lora_cli.artifacts import commit
from lora_cli.artifacts.commit import (
    MANIFEST,
    DamagedFolderError,
    clean_leftovers,
    commit_folder,
    document_sha256,
    make_folders,
    put_in_place,
    remove_folder,
    replace_file,
    staged_beside,
    verify_folder,
)

FILES = {"a.bin": b"\x00\x01\x02\x03", "b.json": b'{"x": 1}\n'}
OLD = {"old.txt": b"old"}


def content(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_a_committed_folder_holds_the_files_and_verifies(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "x"
    commit_folder(target, FILES, facts={"step": 7})
    assert {name: (target / name).read_bytes() for name in FILES} == FILES
    assert sorted(path.name for path in target.parent.iterdir()) == ["x"]
    manifest = verify_folder(target)
    assert manifest["step"] == 7
    assert manifest["complete"] is True
    assert sorted(manifest["files"]) == sorted(FILES)


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    commit_folder(tmp_path / "x", OLD, facts={})
    commit_folder(tmp_path / "x", FILES, facts={}, manifest=False)
    assert content(tmp_path) == {f"x/{name}": value for name, value in FILES.items()}


class FailingCalls:
    """Lets the first calls of an operation through, and makes the next one fail."""

    def __init__(self, real: Callable[..., Any], passes: int) -> None:
        self.real, self.passes, self.failed = real, passes, False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.passes == 0 and not self.failed:
            self.failed = True
            raise OSError(28, "No space left on device")
        self.passes -= 1
        return self.real(*args, **kwargs)


@pytest.mark.parametrize("existed", [True, False])
@pytest.mark.parametrize(
    ("owner", "operation", "count"),
    [(os, "fsync", 4), (Path, "write_bytes", 3), (Path, "mkdir", 1), (commit, "_exchange", 0)],
)
def test_a_failure_of_any_call_leaves_what_was_there(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    owner: Any,
    operation: str,
    count: int,
    existed: bool,
) -> None:
    target = tmp_path / "x"
    if existed:
        commit_folder(target, OLD, facts={})
    before = content(tmp_path)
    if operation == "_exchange":
        count = int(existed)
        if not existed:
            owner, operation, count = Path, "rename", 1
    for passes in range(count):
        fault = FailingCalls(getattr(owner, operation), passes)
        # A plain function is bound to the path that it is called on, as the method is.
        monkeypatch.setattr(owner, operation, lambda *a, _f=fault, **k: _f(*a, **k))
        with pytest.raises(OSError, match="No space left"):
            commit_folder(target, FILES, facts={})
        monkeypatch.undo()
        assert fault.failed
        assert content(tmp_path) == before, (operation, passes)
        assert target.exists() == existed


def test_a_file_makes_way_for_a_folder(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("a file")
    (tmp_path / "staged").mkdir()
    (tmp_path / "staged" / "a").write_bytes(b"new")
    put_in_place(tmp_path / "staged", tmp_path / "x")
    assert content(tmp_path) == {"x/a": b"new"}


@pytest.mark.parametrize("name", FILES)
def test_every_changed_byte_is_found(tmp_path: Path, name: str) -> None:
    commit_folder(tmp_path / "x", FILES, facts={})
    path = tmp_path / "x" / name
    for place in range(len(FILES[name])):
        changed = bytearray(FILES[name])
        changed[place] ^= 1
        path.write_bytes(changed)
        with pytest.raises(DamagedFolderError, match=name):
            verify_folder(tmp_path / "x")
    for damaged in (b"", FILES[name][:-1], FILES[name] + b"\0"):
        path.write_bytes(damaged)
        with pytest.raises(DamagedFolderError, match=name):
            verify_folder(tmp_path / "x")
    path.unlink()
    with pytest.raises(DamagedFolderError, match=name):
        verify_folder(tmp_path / "x")


def signed(document: dict[str, Any]) -> str:
    return json.dumps({**document, "sha256": document_sha256(document)})


def entry(name: str, **changes: Any) -> str:
    return signed({"files": {name: {"sha256": "0" * 64, "bytes": 4, **changes}}})


@pytest.mark.parametrize(
    ("manifest", "finding"),
    [
        ("", "not readable"),
        ('{"files": ', "not readable"),
        ("[]", "not readable"),
        ("{}", "not readable"),
        ('{"files": []}', "not readable"),
        (signed({"files": []}), "not readable"),
        (signed({}), "not readable"),
        ('{"files": {}, "sha256": "0"}', "does not match its own sha256"),
        ("[" * 100_000, "not readable"),
        (entry("a.bin"), "does not match"),
        (entry("../x/a.bin"), "outside the folder"),
        (entry("/etc/hostname"), "outside the folder"),
        (entry("sub/a.bin"), "outside the folder"),
    ],
)
def test_a_bad_manifest_is_found(tmp_path: Path, manifest: str, finding: str) -> None:
    commit_folder(tmp_path / "x", FILES, facts={})
    (tmp_path / "x" / MANIFEST).write_text(manifest)
    with pytest.raises(DamagedFolderError, match=finding):
        verify_folder(tmp_path / "x")


def test_another_size_in_the_manifest_is_found(tmp_path: Path) -> None:
    commit_folder(tmp_path / "x", FILES, facts={})
    path = tmp_path / "x" / MANIFEST
    document = json.loads(path.read_text())
    document["files"]["a.bin"]["bytes"] += 1
    path.write_text(signed(document))
    with pytest.raises(DamagedFolderError, match=r"a\.bin does not have the size"):
        verify_folder(tmp_path / "x")


def test_a_missing_manifest_is_found(tmp_path: Path) -> None:
    commit_folder(tmp_path / "x", FILES, facts={}, manifest=False)
    with pytest.raises(DamagedFolderError, match=MANIFEST):
        verify_folder(tmp_path / "x")


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_modes_follow_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        commit_folder(tmp_path / "x", FILES, facts={})
    finally:
        os.umask(before)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o777 & ~umask
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "x").iterdir()}
    assert modes == {0o666 & ~umask}


def test_a_file_is_replaced_or_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.json"
    replace_file(path, b"one")
    monkeypatch.setattr(os, "fsync", FailingCalls(os.fsync, 0))
    with pytest.raises(OSError, match="No space left"):
        replace_file(path, b"two")
    assert content(tmp_path) == {"x.json": b"one"}
    monkeypatch.undo()
    replace_file(path, b"two")
    assert content(tmp_path) == {"x.json": b"two"}


@pytest.mark.parametrize("is_swapped", [True, False])
def test_without_a_swap_of_names_a_folder_is_still_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_swapped: bool
) -> None:
    if not is_swapped:
        monkeypatch.setattr(commit, "_exchange", lambda *_: False)
    commit_folder(tmp_path / "x", OLD, facts={}, manifest=False)
    commit_folder(tmp_path / "x", FILES, facts={}, manifest=False)
    assert content(tmp_path) == {f"x/{name}": value for name, value in FILES.items()}
    rename = Path.rename
    monkeypatch.setattr(commit, "_exchange", lambda *_: False)

    def fail(self: Path, target: Path) -> Path:
        if self.name.startswith(".tmp-"):
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="Input/output"):
        commit_folder(tmp_path / "x", OLD, facts={}, manifest=False)
    assert content(tmp_path) == {f"x/{name}": value for name, value in FILES.items()}


def test_what_killed_processes_left_is_told_from_the_work_of_living_ones(tmp_path: Path) -> None:
    def leave(name: str) -> None:
        commit_folder(tmp_path / name, FILES, facts={}, manifest=False)

    leave("x")
    for name in (".tmp-x-12345678", ".trash-x-12345678", ".old-x-12345678", ".tmp-y-12345678"):
        leave(name)
    leave(".old-gone-12345678")
    (tmp_path / ".tmp-f.json-12345678").write_bytes(b"part")
    (tmp_path / ".corrupt-step-00000001-12345678").mkdir()
    with staged_beside(tmp_path / "x") as held:
        # Whoever stages beside x cleans up after x alone.
        names = {path.name for path in tmp_path.iterdir()} - {held.name}
        assert names == {
            *("x", ".tmp-y-12345678", ".old-gone-12345678", ".tmp-f.json-12345678"),
            ".corrupt-step-00000001-12345678",
        }
        (held / "a").write_bytes(b"in work")
        clean_leftovers(tmp_path)
        assert (held / "a").read_bytes() == b"in work"
    assert {p.name for p in tmp_path.iterdir()} == {
        *("x", "gone", ".corrupt-step-00000001-12345678")
    }
    assert content(tmp_path / "gone") == FILES
    clean_leftovers(tmp_path / "none")


def test_links_are_replaced_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "a").write_bytes(b"mine")
    for name, where in (("x", "kept"), ("y", "nowhere")):
        (tmp_path / name).symlink_to(tmp_path / where)
        commit_folder(tmp_path / name, FILES, facts={}, manifest=False)
        assert not (tmp_path / name).is_symlink()
        assert content(tmp_path / name) == FILES
    assert content(tmp_path / "kept") == {"a": b"mine"}


def test_a_folder_is_removed_as_a_whole(tmp_path: Path) -> None:
    commit_folder(tmp_path / "x", FILES, facts={})
    remove_folder(tmp_path / "x")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FileNotFoundError):
        remove_folder(tmp_path / "x")


def test_a_folder_that_cannot_be_removed_for_good_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit_folder(tmp_path / "x", FILES, facts={})
    before = content(tmp_path / "x")

    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(commit, "sync_path", full)
    with pytest.raises(OSError, match="No space left"):
        remove_folder(tmp_path / "x")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert content(tmp_path / "x") == before


def test_folders_are_made_and_their_names_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[Path] = []
    monkeypatch.setattr(commit, "sync_path", synced.append)
    make_folders(tmp_path / "a" / "b")
    make_folders(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    assert synced == [tmp_path, tmp_path / "a"]


def test_commit_needs_no_torch() -> None:
    code = (
        "import sys, lora_cli.artifacts.commit; print([m for m in ('torch', 'numpy', 'safetensors',"
        " 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

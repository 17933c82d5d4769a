"""A disk in memory that loses its power: what our writing asks for, and what may be left of it.

The recorder notes every operation of `lora_cli.artifacts.commit` while it runs on a real folder.
`Disk` replays the first of them. Until a file is synced, its content may be lost or cut; until a
folder is synced, each change to its names may be there or not, whatever became of the others. That
is more than any file system does to us, and all that POSIX promises.
"""

import os
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from lora_cli.artifacts import commit

# Decides whether one change that was not synced is there: an index of the operation.
Keep = Callable[[int], bool]


@dataclass(frozen=True)
class Op:
    """One operation: mkdir, write, append, fsync, rename, swap or delete; `note` is a promise."""

    kind: str
    path: str
    other: str = ""
    data: bytes = b""


@contextmanager
def recording(root: Path) -> Iterator[list[Op]]:
    """Note what is written below `root` while the block runs."""
    ops: list[Op] = []

    def short(path: Any) -> str:
        return os.path.relpath(os.fspath(path), root)

    with pytest.MonkeyPatch.context() as patch:

        def wrap(owner: Any, name: str, note: Callable[..., Op]) -> None:
            real = getattr(owner, name)

            def call(*args: Any, **kwargs: Any) -> Any:
                found = note(*args, **kwargs)
                result = real(*args, **kwargs)
                if result is not False:
                    ops.append(found)
                return result

            patch.setattr(owner, name, call)

        def fsync(descriptor: int) -> Op:
            path = Path(f"/proc/self/fd/{descriptor}").readlink()
            return Op("fsync", short(path), data=path.read_bytes() if path.is_file() else b"")

        wrap(Path, "mkdir", lambda path, **_: Op("mkdir", short(path)))
        wrap(Path, "write_bytes", lambda path, data: Op("write", short(path), data=data))
        wrap(Path, "rename", lambda path, target: Op("rename", short(path), short(target)))
        wrap(Path, "replace", lambda path, target: Op("rename", short(path), short(target)))
        wrap(Path, "unlink", lambda path, **_: Op("delete", short(path)))
        wrap(shutil, "rmtree", lambda path, **_: Op("delete", short(path)))
        wrap(commit, "_exchange", lambda path, other: Op("swap", short(path), short(other)))
        wrap(os, "fsync", fsync)
        yield ops


def promise(ops: list[Op], text: str) -> None:
    """Note that from here on `text` holds, whatever happens."""
    ops.append(Op("note", text))


@dataclass
class Node:
    """A file or folder; `names` of a folder, `data` of a file."""

    is_folder: bool
    names: dict[str, "Node"] = field(default_factory=dict)
    data: bytes = b""
    synced_data: bytes = b""
    # Changes to the names that were not synced: what is put where, None takes away.
    pending: list[tuple[int, dict[str, "Node | None"]]] = field(default_factory=list)
    synced_names: dict[str, "Node"] = field(default_factory=dict)


class Disk:
    """What the operations so far have made, and what of it is safe."""

    def __init__(self) -> None:
        self.root = Node(is_folder=True)

    def find(self, path: str) -> Node:
        node = self.root
        for name in Path(path).parts:
            node = node.names[name]
        return node

    def _change(self, number: int, changes: Sequence[tuple[str, Node | None]]) -> None:
        """Put nodes under paths of one folder, as one change."""
        parents = {str(Path(path).parent) for path, _ in changes}
        assert len(parents) == 1, "a change concerns one folder"
        parent = self.find(parents.pop())
        names = {Path(path).name: node for path, node in changes}
        for name, node in names.items():
            if node is None:
                parent.names.pop(name, None)
            else:
                parent.names[name] = node
        parent.pending.append((number, names))

    def apply(self, number: int, op: Op) -> None:
        match op.kind:
            case "mkdir":
                if Path(op.path).name not in self.find(str(Path(op.path).parent)).names:
                    self._change(number, [(op.path, Node(is_folder=True))])
            case "write" | "append":
                if Path(op.path).name not in self.find(str(Path(op.path).parent)).names:
                    self._change(number, [(op.path, Node(is_folder=False))])
                node = self.find(op.path)
                node.data = node.data + op.data if op.kind == "append" else op.data
            case "fsync":
                node = self.find(op.path)
                node.synced_data, node.synced_names = node.data, dict(node.names)
                node.pending.clear()
            case "rename":
                self._change(number, [(op.path, None), (op.other, self.find(op.path))])
            case "swap":
                first, second = self.find(op.path), self.find(op.other)
                self._change(number, [(op.path, second), (op.other, first)])
            case "delete":
                self._delete(number, op.path)

    def _delete(self, number: int, path: str) -> None:
        try:
            node = self.find(path)
        except KeyError:
            return
        for name in list(node.names):
            self._delete(number, f"{path}/{name}")
        self._change(number, [(path, None)])

    def write_to(self, folder: Path, keep: Keep, draw: random.Random, *, cut: bool) -> None:
        """Write what is left after a power cut.

        Args:
            folder: Where to.
            keep: Says of each change to names that was not synced whether it is there.
            draw: Decides how much is there of what was not synced.
            cut: Whether content that was not synced is cut, rather than there as a whole.
        """
        _write(self.root, folder, keep, draw, cut=cut)


def _write(node: Node, place: Path, keep: Keep, draw: random.Random, *, cut: bool) -> None:
    if not node.is_folder:
        data = node.data
        if cut and data != node.synced_data:
            begun = len(node.synced_data) if data.startswith(node.synced_data) else 0
            data = data[: draw.randint(begun, len(data))] if draw.random() < 0.5 else data[:begun]
        place.write_bytes(data)
        return
    place.mkdir()
    names = dict(node.synced_names)
    for number, changes in node.pending:
        if keep(number):
            for name, child in changes.items():
                if child is None:
                    names.pop(name, None)
                else:
                    names[name] = child
    for name, child in names.items():
        _write(child, place / name, keep, draw, cut=cut)


def ways_to_lose(seed: int, *, subsets: int) -> Iterator[tuple[Keep, bool]]:
    """Yield what a power cut may leave: all, nothing that was not synced, and random parts."""
    yield (lambda _: True), False
    yield (lambda _: True), True
    yield (lambda _: False), True
    for number in range(subsets):
        draw = random.Random(f"{seed}-{number}")
        chosen = [draw.random() < 0.5 for _ in range(997)]
        yield (lambda index, chosen=chosen: chosen[index % 997]), draw.random() < 0.7

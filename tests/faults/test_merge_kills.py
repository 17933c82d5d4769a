"""SIGKILL at each write of a merge: its result is absent or whole, and it can be repeated."""

import json
import os
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from made_adapter import make_adapter, store

from lora_cli.lora.settings import LoraSettings

sys.path.insert(0, str(Path(__file__).parent))
from forked import Place, no_leftovers, run_forked
from tally import Tally

LINEAR = ["q_proj", "v_proj", "o_proj", "down_proj"]


@dataclass(frozen=True)
class Merge:
    """The merge that was left alone: how it is asked for, where it writes, and what it makes."""

    arguments: list[str]
    places: list[Place]
    files: dict[str, bytes]


def at_writes(act: Callable[[Place], None]) -> None:
    """Call `act` in the middle of each write of a merge in this process, and around its end."""
    from lora_cli.artifacts import merge_stream
    from lora_cli.commands import streaming

    seen: Counter[str] = Counter()
    patch = pytest.MonkeyPatch()

    def reach(name: str) -> None:
        seen[name] += 1
        act((name, seen[name]))

    def around(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            reach(f"before {name}")
            result = real(*args, **kwargs)
            reach(f"after {name}")
            return result

        patch.setattr(owner, name, call)

    write = merge_stream._Output._write

    def in_halves(output: Any, content: memoryview) -> None:
        middle = len(content) // 2
        write(output, content[:middle])
        reach("write")
        write(output, content[middle:])

    patch.setattr(merge_stream._Output, "_write", in_halves)
    around(streaming, "write_manifest")
    around(streaming, "put_in_place")


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def merge(
    tiny_language_dir: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Merge:
    folder = tmp_path_factory.mktemp("merge")
    base = store(tiny_language_dir("llama"), folder / "base", dtype="bfloat16", shard_size="30KB")
    adapter = make_adapter(folder / "adapter", base, LoraSettings(r=4, alpha=8), targets=LINEAR)
    arguments = ["merge", str(adapter), "output=m", "verify=none"]
    log = folder / "places.txt"

    def note(place: Place) -> None:
        with log.open("a") as file:
            file.write(json.dumps(place) + "\n")

    code, output = run_forked(arguments, cwd=folder, first=lambda: at_writes(note))
    assert code == 0, output
    places = [(name, number) for name, number in map(json.loads, log.read_text().splitlines())]
    return Merge(arguments, places, content(folder / "m"))


def kill_at(place: Place) -> Callable[[], None]:
    def act(found: Place) -> None:
        if found == place:
            os.kill(os.getpid(), signal.SIGKILL)

    return lambda: at_writes(act)


def check_killed(merge: Merge, cwd: Path, place: Place, *, over: bool, tally: Tally) -> None:
    """Kill the merge at a place, look at what is there, and merge again."""
    old: dict[str, bytes] = {}
    if over:
        (cwd / "m").mkdir()
        (cwd / "m" / "config.json").write_bytes(b"{}")
        old = content(cwd / "m")
    arguments = [*merge.arguments, *(["--overwrite"] if over else [])]
    code, output = run_forked(arguments, cwd=cwd, first=kill_at(place))
    assert code == -9, (place, output)
    tally.trials += 1
    found = content(cwd / "m") if (cwd / "m").exists() else {}
    is_done = place == ("after put_in_place", 1)
    tally.lost += found != (merge.files if is_done else old)
    assert found == (merge.files if is_done else old), place
    code, output = run_forked([*merge.arguments, "--overwrite"], cwd=cwd)
    tally.tracebacks += "Traceback" in output
    assert code == 0, (place, output)
    assert content(cwd / "m") == merge.files
    assert no_leftovers(cwd), sorted(cwd.iterdir())


@pytest.mark.parametrize(
    "stride", [pytest.param(1, marks=pytest.mark.faults), pytest.param(27)], ids=["all", "some"]
)
def test_killed_anywhere(merge: Merge, tmp_path: Path, stride: int) -> None:
    tally = Tally("4 SIGKILL at each write of a merge tensor by tensor")
    assert len(merge.places) >= 25
    cases = [(place, over) for over in (False, True) for place in merge.places]
    # The last place is where it has been put in place.
    chosen = [*cases[stride // 3 :: stride], cases[-1]] if stride > 1 else cases
    for number, (place, over) in enumerate(chosen):
        cwd = tmp_path / str(number)
        cwd.mkdir()
        check_killed(merge, cwd, place, over=over, tally=tally)
        shutil.rmtree(cwd)
    assert stride > 1 or tally.trials >= 50
    tally.check()

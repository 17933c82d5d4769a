"""Suite 18: which checkpoints are kept, as a machine of states that hypothesis drives.

Saving, best values, crashes in the middle of a commit, damage, resuming from an earlier step,
checkpoints of other runs and other files in the folder, in any order.
"""

import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from lora_cli.artifacts import checkpoint, commit
from lora_cli.artifacts.checkpoint import (
    Checkpointer,
    checkpoint_path,
    list_checkpoints,
    load_checkpoint,
    load_latest_checkpoint,
    save_checkpoint,
)
from lora_cli.artifacts.commit import verify_folder
from lora_cli.errors import UserError
from lora_cli.training.events import CheckpointDue, Progress, TrainState

sys.path.insert(0, str(Path(__file__).parent))
from tally import Tally

MINE = {"run_id": "mine", "config_sha256": "c"}
OTHER = {"run_id": "other", "config_sha256": "c"}
KEEP = 2
COUNT: Counter[str] = Counter()


class PowerCutError(Exception):
    """The process ends here."""


def state_at(step: int, best: int | None) -> TrainState:
    return TrainState(
        progress=Progress(step=step, samples=step, best_step=best),
        adapter={"a": torch.full((2,), float(step))},
        optimizer={"a/m": torch.full((2,), float(step))},
    )


class Retention(RuleBasedStateMachine):
    """What must be there (`kept`), and what may not be touched (`foreign`)."""

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
        self.folder = self.root / "checkpoints"
        self.folder.mkdir()
        self.step = 0
        self.best: int | None = None
        self.kept: list[int] = []
        self.foreign: dict[str, bytes] = {}
        COUNT["sequences"] += 1

    def teardown(self) -> None:
        shutil.rmtree(self.root)

    def _after_saving(self) -> None:
        own = sorted({*self.kept, self.step})
        newest = own[-KEEP:]
        self.kept = [step for step in own if step in newest or step == self.best]
        self._note_taken_over(self.step)

    def _note_taken_over(self, step: int) -> None:
        """A checkpoint of another run that stood in the way was set aside, not deleted."""
        if f"step-{step:08d}" in self.foreign:
            content = self.foreign.pop(f"step-{step:08d}")
            (aside,) = (
                path
                for path in self.folder.glob(f".foreign-step-{step:08d}-*")
                if path.name not in self.foreign
            )
            self.foreign[aside.name] = content

    def _content(self, path: Path) -> bytes:
        if path.is_file():
            return path.read_bytes()
        return b"|".join(
            p.name.encode() + p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()
        )

    @rule(is_best=st.booleans(), gap=st.integers(1, 3))
    def save(self, is_best: bool, gap: int) -> None:
        COUNT["actions"] += 1
        self.step += gap
        self.best = self.step if is_best else self.best
        listener = Checkpointer(self.folder, keep=KEEP, facts=MINE)
        listener(CheckpointDue(state_at(self.step, self.best)))
        self._after_saving()

    @rule(calls=st.integers(0, 12), gap=st.integers(1, 3))
    def crash_while_saving(self, calls: int, gap: int) -> None:
        """The process ends at one of the calls that writing makes; the next start resumes."""
        COUNT["actions"] += 1
        left = [calls]

        def dying(real: Any) -> Any:
            def call(*args: Any, **kwargs: Any) -> Any:
                if left[0] == 0:
                    raise PowerCutError
                left[0] -= 1
                return real(*args, **kwargs)

            return call

        step = self.step + gap
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(commit, "sync_path", dying(commit.sync_path))
            patch.setattr(commit, "_delete", dying(commit._delete))
            # What the process would have done on its way out.
            patch.setattr(commit.shutil, "rmtree", lambda *a, **k: None)
            try:
                listener = Checkpointer(self.folder, keep=KEEP, facts=MINE)
                listener(CheckpointDue(state_at(step, self.best)))
            except PowerCutError:
                pass
        if checkpoint_path(self.folder, step).exists():
            manifest = verify_folder(checkpoint_path(self.folder, step))
            if manifest["run_id"] == "mine":
                self.step = step
                self._after_saving()
                # It may have died before it got to what is old.
                there = set(list_checkpoints(self.folder)) - self._foreign_steps()
                self.kept = sorted({*self.kept, *there})
        else:
            # Or between setting aside what stood in the way and putting the new one there.
            self._note_taken_over(step)
        self.resume()

    def _foreign_steps(self) -> set[int]:
        return {int(name[5:]) for name in self.foreign if name.startswith("step-")}

    @rule()
    def resume(self) -> None:
        COUNT["actions"] += 1
        try:
            found = load_latest_checkpoint(self.folder, facts=MINE)
        except UserError:
            assert not self.kept
            return
        if not self.kept:
            assert found is None
            self.step, self.best = 0, None
            return
        assert found is not None
        assert found.progress.step == self.kept[-1]
        self.step, self.best = found.progress.step, found.progress.best_step

    @precondition(lambda self: len(self.kept) > 1)
    @rule(data=st.data())
    def resume_from_an_earlier_one(self, data: st.DataObject) -> None:
        COUNT["actions"] += 1
        step = data.draw(st.sampled_from(self.kept[:-1]))
        found = load_checkpoint(checkpoint_path(self.folder, step), facts=MINE)
        for later in [other for other in self.kept if other > step]:
            (aside,) = (
                path
                for path in self.folder.glob(f".later-step-{later:08d}-*")
                if path.name not in self.foreign
            )
            self.foreign[aside.name] = self._content(aside)
        self.kept = [other for other in self.kept if other <= step]
        self.step, self.best = step, found.progress.best_step

    @precondition(lambda self: len(self.kept) > 1)
    @rule(place=st.integers(0, 10_000))
    def damage_the_newest(self, place: int) -> None:
        COUNT["actions"] += 1
        files = sorted(checkpoint_path(self.folder, self.kept[-1]).iterdir())
        path = files[place % len(files)]
        content = bytearray(path.read_bytes())
        content[place % len(content)] ^= 1 << place % 8
        path.write_bytes(content)
        lost = self.kept.pop()
        damaged = self._content(path.parent)
        self.resume()
        aside = list(self.folder.glob(f".corrupt-step-{lost:08d}-*"))
        names = [p.name for p in aside if p.name not in self.foreign]
        assert len(names) == 1
        self.foreign[names[0]] = damaged
        assert self._content(self.folder / names[0]) == damaged

    @rule(step=st.integers(0, 40), kind=st.sampled_from(["other run", "folder", "file"]))
    def plant(self, step: int, kind: str) -> None:
        COUNT["actions"] += 1
        name = f"step-{step:08d}" if kind == "other run" else f"{kind}-{step}"
        if (self.folder / name).exists():
            return
        if kind == "other run":
            save_checkpoint(self.folder, state_at(step, None), facts=OTHER)
        elif kind == "folder":
            (self.folder / name).mkdir()
            (self.folder / name / "x").write_text("mine")
        else:
            (self.folder / name).write_text("mine")
        self.foreign[name] = self._content(self.folder / name)

    @invariant()
    def newest_and_best_verify(self) -> None:
        for step in self.kept:
            assert verify_folder(checkpoint_path(self.folder, step))["run_id"] == "mine"

    @invariant()
    def what_is_not_ours_is_untouched(self) -> None:
        for name, content in self.foreign.items():
            assert self._content(self.folder / name) == content

    @invariant()
    def nothing_else_is_there(self) -> None:
        own = set(list_checkpoints(self.folder)) - self._foreign_steps()
        assert own == set(self.kept)


@pytest.mark.parametrize(
    "sequences", [pytest.param(500, marks=pytest.mark.faults), 25], ids=["500", "25"]
)
def test_newest_and_best_are_never_lost(sequences: int) -> None:
    COUNT.clear()
    run_state_machine_as_test(
        Retention,
        settings=settings(
            max_examples=sequences, stateful_step_count=15, deadline=None, database=None
        ),
    )
    assert COUNT["actions"] > 3 * sequences
    Tally(f"18 retention, {COUNT['sequences']} sequences", trials=COUNT["actions"]).check()


def forget_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Checkpointer._remove_old
    monkeypatch.setattr(
        Checkpointer, "_remove_old", lambda self, *, keep_besides: real(self, keep_besides=set())
    )


def take_all_for_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "is_of_run", lambda *_: True)


def delete_what_is_damaged(monkeypatch: pytest.MonkeyPatch) -> None:
    def delete(path: Path, prefix: str) -> Path:
        shutil.rmtree(path)
        return path

    monkeypatch.setattr(checkpoint, "_set_aside", delete)


def keep_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        checkpoint, "sorted", lambda found, **_: [*sorted(found, **_), 10**9], raising=False
    )


@pytest.mark.parametrize(
    "plant", [forget_the_best, take_all_for_own, delete_what_is_damaged, keep_one]
)
def test_the_machine_notices_a_planted_bug(
    monkeypatch: pytest.MonkeyPatch, plant: Callable[[pytest.MonkeyPatch], None]
) -> None:
    plant(monkeypatch)
    failures = 0
    try:
        run_state_machine_as_test(
            Retention,
            settings=settings(max_examples=60, database=None, phases=[Phase.generate]),
        )
    except Exception:  # noqa: BLE001  # whatever it is that breaks
        failures = 1
    Tally("18 retention with a planted bug", mutants=1, killed=failures).check()

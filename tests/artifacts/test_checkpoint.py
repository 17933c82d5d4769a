"""Checkpoints: bit-equal round trips, what is kept, what happens to damaged ones."""

import logging
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from lora_cli.artifacts.checkpoint import (
    ADAPTER,
    OPTIMIZER,
    Checkpointer,
    list_checkpoints,
    load_checkpoint,
    load_latest_checkpoint,
    save_checkpoint,
)
from lora_cli.artifacts.commit import verify_folder
from lora_cli.errors import UserError
from lora_cli.training.events import CheckpointDue, Progress, RunStarted, TrainState

FACTS = {"config_sha256": "c" * 64}


def make_state(step: int, *, best_step: int | None = None) -> TrainState:
    draw = torch.Generator().manual_seed(step)
    odd = torch.tensor([float("nan"), float("inf"), -0.0, 1e-45, 3.4e38])
    return TrainState(
        progress=Progress(
            step=step,
            samples=16 * step,
            best_metric=None if best_step is None else 0.1 + step,
            best_step=best_step,
            evaluations_without_improvement=step % 3,
            seconds=12.5,
            train_seconds=2.25,
        ),
        adapter={"a.lora_A.weight": torch.randn(4, 8, generator=draw), "odd": odd},
        optimizer={
            "a.lora_A.weight/exp_avg": torch.randn(4, 8, generator=draw),
            "a.lora_A.weight/step": torch.tensor(float(step)),
        },
    )


def bits(state: TrainState) -> dict[str, bytes]:
    tensors = {**state.adapter, **{f"optimizer/{n}": t for n, t in state.optimizer.items()}}
    tensors |= {f"method/{name}": tensor for name, tensor in state.method.items()}
    return {name: bytes(tensor.numpy().tobytes()) for name, tensor in tensors.items()}


def test_a_state_comes_back_bit_for_bit(tmp_path: Path) -> None:
    state = make_state(100, best_step=60)
    path = save_checkpoint(tmp_path, state, facts=FACTS)
    assert path.name == "step-00000100"
    assert verify_folder(path)["step"] == 100
    loaded = load_latest_checkpoint(tmp_path, facts=FACTS)
    assert loaded is not None
    assert asdict(loaded.progress) == asdict(state.progress)
    assert bits(loaded) == bits(state)


def test_what_a_variant_keeps_comes_along(tmp_path: Path) -> None:
    method = {"mean/a.lora_A": torch.rand(2, 3), "alive/a": torch.tensor([[True], [False]])}
    state = replace(make_state(7), method=method)
    path = save_checkpoint(tmp_path, state, facts=FACTS)
    loaded = load_latest_checkpoint(tmp_path, facts=FACTS)
    assert loaded is not None
    assert bits(loaded) == bits(state)
    assert loaded.method["alive/a"].dtype == torch.bool
    # Losing it must not pass for a run that keeps nothing.
    (path / "method.safetensors").unlink()
    with pytest.raises(UserError):
        load_latest_checkpoint(tmp_path, facts=FACTS)


@pytest.mark.parametrize(
    ("keep", "best", "kept"),
    [(2, {}, [4, 5]), (3, {3: 1, 4: 1, 5: 1}, [1, 3, 4, 5]), (2, {1: 1, 3: 3}, [4, 5])],
)
def test_the_newest_and_the_best_are_kept(
    tmp_path: Path, keep: int, best: dict[int, int], kept: list[int]
) -> None:
    listener = Checkpointer(tmp_path, keep=keep, facts=FACTS)
    listener(RunStarted(0, 5, 5, 80))
    assert list(tmp_path.iterdir()) == []
    for step in range(1, 6):
        listener(CheckpointDue(make_state(step, best_step=best.get(step))))
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step-{s:08d}" for s in kept]
    assert sorted(list_checkpoints(tmp_path)) == kept


def test_only_whole_checkpoints_are_listed(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, make_state(3), facts=FACTS)
    for name in (".tmp-step-00000004-ab12cd34", ".corrupt-step-00000002-ab12cd34", "step-4", "x"):
        (tmp_path / name).mkdir()
    assert list_checkpoints(tmp_path) == {3: tmp_path / "step-00000003"}
    assert list_checkpoints(tmp_path / "none") == {}


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("lora_cli"), "propagate", True)
    for step in (1, 2):
        save_checkpoint(tmp_path, make_state(step), facts=FACTS)
    for _ in range(2):  # the same step may be damaged again after it has been repeated
        save_checkpoint(tmp_path, make_state(3), facts=FACTS)
        damage(tmp_path / "step-00000003" / ADAPTER)
        caplog.clear()
        loaded = load_latest_checkpoint(tmp_path, facts=FACTS)
        assert loaded is not None
        assert bits(loaded) == bits(make_state(2))
        assert "step-00000003 is damaged (adapter.safetensors does not match" in caplog.text
        assert sorted(list_checkpoints(tmp_path)) == [1, 2]
    aside = [path for path in tmp_path.iterdir() if path.name.startswith(".corrupt-step-00000003")]
    assert len(aside) == 2
    assert all((path / ADAPTER).is_file() for path in aside)


def problem_of(caught: pytest.ExceptionInfo[UserError]) -> str:
    (problem,) = caught.value.problems
    assert problem.fix
    return problem.id


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_from_nothing(
    tmp_path: Path,
) -> None:
    assert load_latest_checkpoint(tmp_path / "none", facts=FACTS) is None
    assert load_latest_checkpoint(tmp_path, facts=FACTS) is None
    save_checkpoint(tmp_path, make_state(1), facts=FACTS)
    (tmp_path / "step-00000001" / "MANIFEST.json").unlink()
    for _ in range(2):  # the second time there is only what was set aside
        with pytest.raises(UserError) as caught:
            load_latest_checkpoint(tmp_path, facts=FACTS)
        assert problem_of(caught) == "resume.no-checkpoint"
    assert [path.name[:22] for path in tmp_path.iterdir()] == [".corrupt-step-00000001"]


@pytest.mark.parametrize(
    ("key", "problem"),
    [
        ("config_sha256", "resume.other-config"),
        ("base_sha256", "resume.other-base"),
        ("rows_sha256", "resume.other-rows"),
    ],
)
def test_another_configuration_base_or_data_is_refused(
    tmp_path: Path, key: str, problem: str
) -> None:
    facts = {**FACTS, "base_sha256": "b" * 64, "rows_sha256": "r" * 64}
    folder = tmp_path / "checkpoints"
    path = save_checkpoint(folder, make_state(1), facts=facts)
    for load in (
        lambda: load_latest_checkpoint(folder, facts={**facts, key: "d" * 64}),
        lambda: load_checkpoint(path, facts={**facts, key: "d" * 64}),
    ):
        with pytest.raises(UserError) as caught:
            load()
        assert problem_of(caught) == problem
    assert list(list_checkpoints(folder)) == [1]
    assert caught.value.problems[0].where == str(path)
    if key == "config_sha256":
        assert str(tmp_path / "recipe.yaml") in str(caught.value.problems[0].fix)


def test_the_manifest_names_files_tensors_and_run(tmp_path: Path) -> None:
    facts = {**FACTS, "run_id": "r", "world_size": 2, "versions": {"torch": "2.13"}}
    path = save_checkpoint(tmp_path, make_state(5), facts=facts)
    manifest = verify_folder(path)
    assert manifest.items() >= facts.items()
    assert manifest["step"] == 5
    assert sorted(manifest["files"]) == ["adapter.safetensors", OPTIMIZER, "progress.json"]
    assert manifest["files"][ADAPTER]["bytes"] == (path / ADAPTER).stat().st_size
    assert manifest["tensors"][OPTIMIZER] == {
        "a.lora_A.weight/exp_avg": {"shape": [4, 8], "dtype": "float32"},
        "a.lora_A.weight/step": {"shape": [], "dtype": "float32"},
    }


def test_another_version_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("lora_cli"), "propagate", True)
    save_checkpoint(tmp_path, make_state(5), facts={**FACTS, "versions": {"torch": "2.13"}})
    load_latest_checkpoint(tmp_path, facts={**FACTS, "versions": {"torch": "2.13"}})
    assert caplog.text == ""
    load_latest_checkpoint(tmp_path, facts={**FACTS, "versions": {"torch": "2.14"}})
    assert "from torch 2.13 and this is 2.14" in caplog.text


def test_checkpoints_of_other_runs_are_neither_used_nor_deleted(tmp_path: Path) -> None:
    mine, other = {**FACTS, "run_id": "mine"}, {**FACTS, "run_id": "other"}
    for step in (2, 1000):
        save_checkpoint(tmp_path, make_state(step), facts=other)
    (tmp_path / "notes").mkdir()
    with pytest.raises(UserError) as caught:
        load_latest_checkpoint(tmp_path, facts=mine)
    assert problem_of(caught) == "resume.no-checkpoint"
    listener = Checkpointer(tmp_path, keep=2, facts=mine)
    for step in (1, 2, 3, 4):
        listener(CheckpointDue(make_state(step)))
    loaded = load_latest_checkpoint(tmp_path, facts=mine)
    assert loaded is not None
    assert loaded.progress.step == 4
    names = {path.name for path in tmp_path.iterdir()}
    (foreign,) = (name for name in names if name.startswith(".foreign-step-00000002-"))
    assert names == {foreign, "notes", "step-00000003", "step-00000004", "step-00001000"}
    for name in (foreign, "step-00001000"):
        assert verify_folder(tmp_path / name)["run_id"] == "other"


def test_a_named_checkpoint_is_used_and_later_ones_are_set_aside(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, make_state(step), facts=FACTS)
    loaded = load_checkpoint(tmp_path / "step-00000002", facts=FACTS)
    assert bits(loaded) == bits(make_state(2))
    assert sorted(list_checkpoints(tmp_path)) == [1, 2]
    (later,) = tmp_path.glob(".later-step-00000003-*")
    assert verify_folder(later)["step"] == 3


def test_a_named_checkpoint_that_is_damaged_or_foreign_is_refused(tmp_path: Path) -> None:
    for step in (1, 2):
        save_checkpoint(tmp_path, make_state(step), facts=FACTS)
    damage(tmp_path / "step-00000002" / OPTIMIZER)
    for name, facts in (("step-00000002", FACTS), ("step-00000001", {**FACTS, "run_id": "x"})):
        with pytest.raises(UserError) as caught:
            load_checkpoint(tmp_path / name, facts=facts)
        assert problem_of(caught) == "resume.damaged-checkpoint"
    assert sorted(list_checkpoints(tmp_path)) == [1, 2]


def test_room_for_all_checkpoints_is_asked_for_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int]] = []

    def note(folder: Path, *, file_bytes: int, copies: int, other_bytes: int) -> None:
        asked.append((file_bytes, copies))
        assert other_bytes > 2000  # the adapter twice, and some room for the report

    monkeypatch.setattr("lora_cli.artifacts.checkpoint.check_space", note)
    listener = Checkpointer(tmp_path, keep=3, facts=FACTS, expected_bytes=3000)
    listener(RunStarted(0, 5, 5, 80))
    for step in range(1, 6):
        listener(CheckpointDue(make_state(step)))
    listener(RunStarted(5, 5, 5, 80))
    assert asked == [(3000, 5), (3000, 2)]


def test_a_run_that_was_killed_before_it_removed_what_is_old_does_so_later(
    tmp_path: Path,
) -> None:
    for step in range(1, 6):
        save_checkpoint(tmp_path, make_state(step, best_step=2 if step > 1 else None), facts=FACTS)
    Checkpointer(tmp_path, keep=2, facts=FACTS)(RunStarted(5, 9, 5, 80))
    assert sorted(list_checkpoints(tmp_path)) == [2, 4, 5]


def test_an_old_checkpoint_that_cannot_be_deleted_is_no_reason_to_stop(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("lora_cli"), "propagate", True)

    def fail(path: Path) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("lora_cli.artifacts.checkpoint.remove_folder", fail)
    listener = Checkpointer(tmp_path, keep=2, facts=FACTS)
    for step in range(1, 4):
        listener(CheckpointDue(make_state(step)))
    assert sorted(list_checkpoints(tmp_path)) == [1, 2, 3]
    assert "step-00000001 cannot be deleted: Input/output error" in caplog.text

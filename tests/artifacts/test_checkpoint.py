"""Checkpoints: bit-equal round trips, what is kept, what happens to damaged ones."""

import logging
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from lora_cli.artifacts.checkpoint import (
    ADAPTER,
    Checkpointer,
    list_checkpoints,
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
    assert load_latest_checkpoint(tmp_path, facts=FACTS) is None


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


def test_damaged_everywhere_or_empty_means_none(tmp_path: Path) -> None:
    assert load_latest_checkpoint(tmp_path, facts=FACTS) is None
    save_checkpoint(tmp_path, make_state(1), facts=FACTS)
    (tmp_path / "step-00000001" / "MANIFEST.json").unlink()
    assert load_latest_checkpoint(tmp_path, facts=FACTS) is None


def test_another_configuration_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "checkpoints", make_state(1), facts=FACTS)
    with pytest.raises(UserError) as caught:
        load_latest_checkpoint(tmp_path / "checkpoints", facts={"config_sha256": "d" * 64})
    (problem,) = caught.value.problems
    assert problem.id == "resume.other-config"
    assert problem.fix is not None
    assert str(tmp_path / "recipe.yaml") in problem.fix
    assert list_checkpoints(tmp_path / "checkpoints")

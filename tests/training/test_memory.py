import weakref
from typing import Any

import pytest
import torch

from lora_cli.config.sections import TrainerConfig
from lora_cli.errors import Problem, RunFailedError
from lora_cli.training.events import BatchHalved, Event, Progress
from lora_cli.training.group import Group
from lora_cli.training.memory import (
    OUT_OF_MEMORY,
    BatchSizes,
    fitted,
    is_out_of_memory,
    memory_checked,
)


def sizes(*, num_processes: int = 1, couples_rows: bool = False, **settings: Any) -> BatchSizes:
    config = TrainerConfig(**{"auto_micro_batch": True, "global_batch_size": 32, **settings})
    return BatchSizes(config, num_processes=num_processes, couples_rows=couples_rows)


def real_error() -> RuntimeError:
    """Return what torch says on this machine when it cannot have what it asks for."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    return caught.value


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9"), True),
        (RuntimeError("could not create a primitive"), True),
        (MemoryError(), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_counts_as_out_of_memory(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) == expected


def test_the_allocator_of_this_machine_is_understood() -> None:
    assert is_out_of_memory(real_error())


def test_other_errors_pass_unchanged() -> None:
    error = RuntimeError("shapes")
    with pytest.raises(RuntimeError) as caught, memory_checked(4, "training"):
        raise error
    assert caught.value is error
    with (
        pytest.raises(RunFailedError, match="4 do not when training") as found,
        memory_checked(4, "training"),
    ):
        raise MemoryError
    assert found.value.problems[0].id == OUT_OF_MEMORY


def test_sizes_shrink_through_divisors_of_the_global_batch() -> None:
    found = sizes(global_batch_size=24)
    seen = [found.train]
    while found.halve("train"):
        seen.append(found.train)
    assert seen == [24, 12, 6, 3, 1]
    shared = sizes(global_batch_size=20, num_processes=2)
    assert (shared.halve("train"), shared.train) == (True, 5)
    assert (shared.halve("train"), shared.train) == (True, 2)
    shared = sizes(global_batch_size=10, num_processes=2)
    assert (shared.halve("train"), shared.train, shared.halve("train")) == (True, 1, False)
    odd = sizes(global_batch_size=7)
    assert (odd.halve("train"), odd.train, odd.halve("train")) == (True, 1, False)


def test_each_process_has_its_share() -> None:
    assert sizes(num_processes=2).train == 16
    assert sizes(num_processes=3).train == 11
    assert sizes(num_processes=2, micro_batch_size=4).train == 4


def test_halves_are_kept_in_progress() -> None:
    first = sizes(eval_batch_size=10)
    assert first.noted(Progress(step=3)) == Progress(step=3)
    assert first.halved() == {}
    first.halve("train")
    first.halve("eval")
    noted = first.noted(Progress(step=3))
    assert (noted.micro_batch_size, noted.eval_batch_size) == (16, 5)
    second = sizes(eval_batch_size=10)
    second.resume(noted)
    assert (second.train, second.evaluation) == (16, 5)
    assert second.halved() == {"micro_batch_size": 16, "eval_batch_size": 5}
    # The user may have set a smaller one since.
    third = sizes(micro_batch_size=2)
    third.resume(noted)
    assert third.train == 2


@pytest.mark.parametrize(
    ("settings", "kind", "fix"),
    [
        ({}, "train", "set trainer.micro_batch_size=16: 2 micro-batches per step, same gradients"),
        ({"couples_rows": True}, "train", "=16, which compares each row with fewer others"),
        ({"micro_batch_size": 16}, "train", "=8: 4 micro-batches per step"),
        ({"num_processes": 2}, "train", "=8: 2 micro-batches per step"),
        ({"global_batch_size": 10, "num_processes": 2}, "train", "=1: 5 micro-batches per step"),
        ({"eval_batch_size": 9}, "eval", "set trainer.eval_batch_size=4: same results"),
        ({"micro_batch_size": 1}, "train", "trainer.gradient_checkpointing=true"),
        ({"eval_batch_size": 1}, "eval", "task.max_length"),
    ],
)
def test_the_error_says_what_keeps_the_gradients(
    settings: dict[str, int], kind: Any, fix: str
) -> None:
    (problem,) = sizes(auto_micro_batch=False, **settings).explained(kind).problems
    assert problem.id == OUT_OF_MEMORY
    assert fix in str(problem.fix)
    now = settings.get("micro_batch_size", settings.get("eval_batch_size"))
    assert ("1 row does not" in problem.message) == (now == 1)


def test_acting_again_until_it_fits() -> None:
    found, told = sizes(), list[Event]()
    tries: list[int] = []

    def act() -> str:
        tries.append(found.train)
        with memory_checked(found.train, "training"):
            if found.train > 4:
                raise MemoryError
        return "done"

    assert fitted(found, "train", act, step=3, tell=told.append) == "done"
    assert tries == [32, 16, 8, 4]
    assert told == [BatchHalved(3, "train", rows) for rows in (16, 8, 4)]


def test_what_the_failed_pass_held_is_gone_before_the_next() -> None:
    found, held = sizes(), list[weakref.ref[torch.Tensor]]()

    def act() -> int:
        alive = sum(reference() is not None for reference in held)
        activations = torch.ones(found.train)
        held.append(weakref.ref(activations))
        with Group().together(), memory_checked(found.train, "training"):
            if found.train > 8:
                raise MemoryError
        return alive

    assert fitted(found, "train", act, step=0, tell=lambda _: None) == 0
    assert len(held) == 3


@pytest.mark.parametrize("auto", [True, False])
def test_what_never_fits_is_an_error(auto: bool) -> None:
    found = sizes(auto_micro_batch=auto, eval_batch_size=4)
    tries: list[int] = []

    def act() -> None:
        tries.append(found.evaluation)
        with memory_checked(found.evaluation, "evaluating"):
            raise MemoryError

    with pytest.raises(RunFailedError, match=r"`trainer.eval_batch_size` must be so small"):
        fitted(found, "eval", act, step=0, tell=lambda _: None)
    assert tries == ([4, 2, 1] if auto else [4])


def test_other_failures_are_not_repeated() -> None:
    error = RunFailedError(Problem(id="train.not-finite", message="NaN"))
    tries = []

    def act() -> None:
        tries.append(1)
        raise error

    with pytest.raises(RunFailedError) as caught:
        fitted(sizes(), "train", act, step=0, tell=lambda _: None)
    assert (caught.value, len(tries)) == (error, 1)

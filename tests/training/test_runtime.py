from typing import Any

import pytest
import torch
from torch import nn

from lora_cli.errors import UserError
from lora_cli.training.runtime import Runtime, default_device, device_of, move_to, seed_step


def draw(seed: int, step: int, rank: int) -> list[float]:
    seed_step(seed, step=step, rank=rank)
    values: list[float] = torch.rand(3).tolist()
    return values


def test_dropout_is_a_function_of_seed_step_and_rank() -> None:
    first = draw(1, 2, 0)
    torch.rand(100)
    assert draw(1, 2, 0) == first
    assert len({tuple(draw(*key)) for key in ((1, 2, 0), (1, 2, 1), (1, 3, 0), (2, 2, 0))}) == 4


def test_tensors_are_moved_wherever_they_are() -> None:
    batch = {"ids": ["a"], "inputs": {"x": torch.ones(1)}, "labels": None}
    moved = move_to(batch, torch.device("meta"))
    assert moved["inputs"]["x"].device.type == "meta"
    assert (moved["ids"], moved["labels"]) == (["a"], None)


def test_what_is_no_module_computes_on_the_cpu() -> None:
    assert device_of(nn.Linear(1, 1)) == default_device()
    assert device_of(lambda x: x) == torch.device("cpu")


def test_one_process_leaves_the_model_alone() -> None:
    runtime = Runtime(precision="float32")
    model = nn.Linear(2, 2)
    prepared = runtime.prepare(model)
    assert (runtime.rank, runtime.world_size) == (0, 1)
    assert prepared is model
    assert runtime.device == default_device()
    assert runtime.total(torch.tensor([2.0, 3.0])).tolist() == [2.0, 3.0]


def test_jobs_of_a_sweep_may_differ_in_precision() -> None:
    x = torch.ones(1, 2)
    seen = []
    for precision in ("bf16", "float32"):
        layer, dtypes = nn.Linear(2, 2), list[torch.dtype]()
        layer.register_forward_hook(lambda _m, _i, output, seen=dtypes: seen.append(output.dtype))
        runtime = Runtime(precision=precision)  # type: ignore[arg-type]  # both are literals
        runtime.prepare(nn.Sequential(layer))(x.to(runtime.device))
        seen += dtypes
    assert seen == [torch.bfloat16, torch.float32]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU computes in fp16")
def test_fp16_on_the_cpu_is_refused() -> None:
    with pytest.raises(UserError, match="needs a GPU"):
        Runtime(precision="fp16")


@pytest.mark.gpu
def test_fp16_scales_and_unscales_the_gradient() -> None:
    runtime = Runtime(precision="fp16")
    layer = nn.Linear(4, 1, bias=False)
    model = runtime.prepare(layer)
    optimizer = runtime.prepare_optimizer(torch.optim.SGD(layer.parameters(), lr=0.1))
    runtime.backward(model(torch.ones(1, 4, device=runtime.device)).sum())
    runtime.unscale(optimizer)
    assert layer.weight.grad is not None
    torch.testing.assert_close(layer.weight.grad.cpu(), torch.ones(1, 4))


def test_a_step_that_the_loss_scaler_left_out() -> None:
    runtime = Runtime(precision="float32")
    parameter = nn.Parameter(torch.ones(1))
    optimizer: Any = runtime.prepare_optimizer(torch.optim.SGD([parameter], lr=0.1))
    parameter.grad = torch.ones(1)
    optimizer.step()
    assert not runtime.was_skipped(optimizer)
    # As Accelerate marks an overflow, which needs a GPU to happen.
    optimizer._is_overflow = True
    assert runtime.was_skipped(optimizer)

from typing import Any

import pytest
import torch
from torch import nn

from lora_cli.config.sections import TrainerConfig
from lora_cli.errors import UserError
from lora_cli.training.runtime import (
    Runtime,
    check_device,
    default_device,
    device_of,
    move_to,
    seed_step,
    use_tf32,
)
from lora_cli.training.sharding import sharding_of_accelerate


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
    assert (runtime.group.rank, runtime.group.size) == (0, 1)
    assert prepared is model
    assert runtime.device == default_device()


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


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU may have TF32")
def test_tf32_on_the_cpu_is_refused() -> None:
    use_tf32(False)
    with pytest.raises(UserError, match="where there is no GPU"):
        use_tf32(True)


def test_tf32_is_switched_on_and_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_cli.training.runtime.default_device", lambda: torch.device("cuda"))
    before = torch.get_float32_matmul_precision()
    try:
        use_tf32(True)
        assert torch.get_float32_matmul_precision() == "high"
        use_tf32(False)
        assert torch.get_float32_matmul_precision() == "highest" == before
    finally:
        torch.set_float32_matmul_precision(before)


def test_the_loss_scale_of_a_scaler_continues() -> None:
    runtime = Runtime(precision="float32")
    assert runtime.loss_scale() is None
    runtime.set_loss_scale(8.0, 3)
    runtime._accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    assert runtime.loss_scale() == (64.0, 0)
    runtime.set_loss_scale(8.0, 3)
    assert runtime.loss_scale() == (8.0, 3)
    # It is what the next loss is multiplied by.
    assert runtime._accelerator.scaler.scale(torch.tensor(2.0)).item() == 16.0
    assert runtime.loss_scale() == (8.0, 3)
    runtime.set_loss_scale(None, 0)
    assert runtime.loss_scale() == (8.0, 3)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"),
        ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM"),
    ],
)
def test_what_accelerate_was_asked_for_is_not_ignored(
    monkeypatch: pytest.MonkeyPatch, name: str, what: str
) -> None:
    monkeypatch.setenv(name, "true")
    with pytest.raises(UserError, match=f"asks for {what}") as caught:
        Runtime(precision="float32")
    assert caught.value.problems[0].id == "distributed.unsupported"
    monkeypatch.setenv(name, "false")
    assert Runtime(precision="float32").group.size == 1


def test_one_process_has_nobody_to_share_the_base_with(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="must be false in a run of one process") as caught:
        Runtime(precision="float32", shard_base=True)
    assert caught.value.problems[0].id == "distributed.no-sharding"
    sharding_of_accelerate.cache_clear()
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(UserError, match="must be false in a run of one process"):
        Runtime(precision="float32")
    sharding_of_accelerate.cache_clear()
    assert Runtime(precision="float32").sharding is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU may do both")
def test_all_that_the_device_cannot_do_is_named_at_once() -> None:
    check_device(TrainerConfig(precision="bf16"))
    with pytest.raises(UserError) as caught:
        check_device(TrainerConfig(precision="fp16", tf32=True))
    assert [p.id for p in caught.value.problems] == ["trainer.precision", "trainer.tf32"]

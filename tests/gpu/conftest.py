"""Tests that need a GPU: skipped, with the reason, where there is none.

Run them with `make gpu`. Equal runs are bit-equal on a GPU only with kernels that add up in a fixed
order, which torch is told to take here.
"""

import os
from collections.abc import Iterator

import pytest
import torch

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.fixture(autouse=True)
def gpus(request: pytest.FixtureRequest) -> Iterator[None]:
    wanted = 2 if request.node.get_closest_marker("multi_gpu") else 1
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if found < wanted:
        pytest.skip(f"needs {wanted} GPU with CUDA, and this machine has {found}")
    torch.use_deterministic_algorithms(True)
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cuda.enable_flash_sdp(True)
    torch.backends.cuda.enable_mem_efficient_sdp(True)

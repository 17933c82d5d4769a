"""Memory that really runs out: a process that may have only so much."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

SCRIPT = """
import importlib.util, json, resource, sys
from pathlib import Path

spec = importlib.util.spec_from_file_location("support", sys.argv[1])
support = importlib.util.module_from_spec(spec)
spec.loader.exec_module(support)
from lora_cli.training.events import BatchHalved, StepDone

heard = []

def build():
    return support.build_trainer(
        Path(sys.argv[2]), Path(sys.argv[3]), listeners=[heard.append], max_steps=1,
        global_batch_size=64, model_dropout=False, auto_micro_batch=True,
    )

free, limited = build(), build()
free._backward(free.plan.train[:8])
pages = int(Path("/proc/self/statm").read_text().split()[0])
limit = pages * resource.getpagesize() + 70 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
limited._train_step()
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
free._train_step()
print(json.dumps({
    "rows": [event.rows for event in heard if isinstance(event, BatchHalved)],
    "losses": [event.loss for event in heard if isinstance(event, StepDone)],
    "norms": [event.grad_norm for event in heard if isinstance(event, StepDone)],
}))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_step_finds_what_fits(
    tiny_model_dir: Callable[..., Path], toy_reviews: Path, tmp_path: Path
) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    support = Path(__file__).with_name("support.py")
    done = subprocess.run(
        [sys.executable, script, support, tiny_model_dir(hidden=512, layers=6), toy_reviews],
        capture_output=True,
        text=True,
        check=False,
        # So that what is freed goes back at once, and does not count any more.
        env={**os.environ, "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["rows"]
    assert found["rows"][0] == 32
    # The limited one first, then the free one.
    assert found["losses"][0] == pytest.approx(found["losses"][1], rel=1e-4)
    assert found["norms"][0] == pytest.approx(found["norms"][1], rel=1e-3)

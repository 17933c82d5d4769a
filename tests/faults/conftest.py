"""The run of two processes that tests disturb."""

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from together import Setup, make_setup


@pytest.fixture(scope="module")
def pair_setup(tiny_run: Any, tmp_path_factory: pytest.TempPathFactory) -> Setup:
    return make_setup(tiny_run, tmp_path_factory.mktemp("processes"))


@pytest.fixture
def setup(pair_setup: Setup) -> Setup:
    """The run, without what another test has left."""
    shutil.rmtree(pair_setup.folder / "a", ignore_errors=True)
    (pair_setup.folder / "ids.jsonl").unlink(missing_ok=True)
    return pair_setup

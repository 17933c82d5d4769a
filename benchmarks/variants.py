"""Train one task with every variant, start and strategy, and print a Markdown table.

The data is the package's own set of movie reviews (`python -m lora_cli.data.movie_reviews`), or a
text classification file or folder. Seed 1 tries each learning rate of a method; the one that is
best on validation rows is run with the other seeds as well; accuracy is that on test rows. Time and
memory come from short runs, each next to one of plain LoRA: nothing else may run then.

    python benchmarks/variants.py [DATA] --rows 1000 --seeds 2 --results FILE

FILE keeps what was run, so that an interrupted comparison goes on where it stopped.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

Result = dict[str, Any]

# What is chosen, and the learning rates that it is tried with.
LORA_LRS = (2e-3, 4e-3)
MORE_LRS = (*LORA_LRS, 8e-3)
METHODS: dict[str, tuple[Sequence[str], Sequence[float]]] = {
    "lora, r 8": ((), MORE_LRS),
    "lora, r 2": (("lora.r=2", "lora.alpha=4"), MORE_LRS),
    "lora, r 64": (("lora.r=64",), MORE_LRS),
    "rsLoRA, r 64": (("lora=rslora", "lora.r=64"), MORE_LRS),
    "all-linear": (("lora=all-linear",), LORA_LRS),
    "top 2 blocks": (("lora.layers=[top-2]",), LORA_LRS),
    "gaussian start": (("lora.init=gaussian",), LORA_LRS),
    "PiSSA": (("lora=pissa",), MORE_LRS),
    "OLoRA": (("lora=olora",), MORE_LRS),
    "EVA": (("lora=eva",), LORA_LRS),
    "DoRA": (("lora=dora",), LORA_LRS),
    "LoRA-FA": (("lora=lora_fa",), (4e-3, 8e-3, 1.6e-2)),
    "LoRA+": (("optimizer=lora_plus",), (2e-3, 4e-3)),
    "AdaLoRA": (("lora=adalora",), (8e-3, 1.6e-2, 3.2e-2)),
    "VeRA, r 64": (("lora=vera", "lora.r=64"), (1e-2, 3e-2)),
    "biases too": (("lora.bias=all",), LORA_LRS),
    "strategy=head": (("strategy=head",), (2e-2, 8e-2)),
    "strategy=bitfit": (("strategy=bitfit",), (4e-3, 8e-3)),
    "strategy=top": (("strategy=top",), (3e-4, 1e-3)),
    "strategy=adapter": (("strategy=adapter",), (2e-3, 4e-3)),
    "strategy=prefix": (("strategy=prefix",), (2e-2, 5e-2)),
    "strategy=full": (("strategy=full",), (1e-4, 3e-4)),
    "strategy=lora_then_full": (("strategy=lora_then_full",), LORA_LRS),
}
PLAIN = next(iter(METHODS))


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("data", nargs="?", help="file or folder; the movie reviews where left out")
    add("--rows", type=int, default=1000, help="training rows")
    add("--eval-rows", type=int, default=500, help="validation and test rows")
    add("--seeds", type=int, default=2, help="runs with the best learning rate")
    add("--epochs", type=int, default=3)
    add("--only", nargs="+", choices=METHODS, default=list(METHODS), help="these methods")
    add("--results", type=Path, default=Path("variants.jsonl"), help="what was run, kept")
    add("--untimed", action="store_true", help="leave time and memory for a later call")
    return parser.parse_args()


class Bench:
    """Runs each pair of options and seed once, and keeps what came out in a file."""

    def __init__(self, args: argparse.Namespace) -> None:
        """Read what earlier calls have run with the same data."""
        source = ["task=movie_reviews"] if not args.data else [f"task.data.path={args.data}"]
        common = ["model=minilm", *source, f"task.data.max_train_rows={args.rows}"]
        rows = "task.data.max_eval_rows"
        self.whole = [*common, f"trainer.epochs={args.epochs}", f"{rows}={args.eval_rows}"]
        self.short = [*common, "trainer.max_steps=12", f"{rows}=32"]
        self.file: Path = args.results
        self.known: dict[str, Result] = {}
        if self.file.exists():
            self.known = {r["key"]: r for r in map(json.loads, self.file.read_text().splitlines())}

    def run(self, method: str, lr: float, seed: int) -> Result:
        """Train, and evaluate on test rows."""
        return self._once(self.whole, method, lr, seed, test=True)

    def timed(self, method: str, lr: float) -> tuple[float, float]:
        """Return time and peak memory as ratios to a run of plain LoRA just before."""
        plain = self._once(self.short, PLAIN, LORA_LRS[0], 1, name=f"before {method}")
        this = self._once(self.short, method, lr, 1)
        speed = plain["samples_per_second"] / this["samples_per_second"]
        return speed, this["peak_rss_bytes"] / plain["peak_rss_bytes"]

    def _once(
        self,
        common: Sequence[str],
        method: str,
        lr: float,
        seed: int,
        *,
        test: bool = False,
        name: str = "",
    ) -> Result:
        options = [*common, *METHODS[method][0], f"optimizer.lr={lr}", f"seed={seed}"]
        key = " ".join([*options, name])
        if key not in self.known:
            with tempfile.TemporaryDirectory() as folder:
                run = Path(folder) / "run"
                result = command("train", *options, f"run.dir={run}") | {"key": key}
                if test:
                    result["test"] = command("eval", str(run))["adapter"]["accuracy"]
            with self.file.open("a") as out:
                out.write(json.dumps(result) + "\n")
            self.known[key] = result
        return self.known[key]

    def best(self, method: str) -> float:
        """Return the learning rate with the best validation accuracy, then the least loss."""

        def score(lr: float) -> tuple[float, float]:
            scores = self.run(method, lr, 1)["adapter"]
            return scores["accuracy"], -scores["loss"]

        return max(METHODS[method][1], key=score)


def command(*arguments: str) -> Result:
    """Run lora-cli; return its result, or end with its exit code."""
    line = [sys.executable, "-m", "lora_cli", *arguments, "--json", "--quiet"]
    ended = subprocess.run(line, stdout=subprocess.PIPE, text=True)
    if ended.returncode != 0:
        sys.exit(f"error: {' '.join(line)} ended with exit code {ended.returncode}")
    result: Result = json.loads(ended.stdout)
    return result


def table(bench: Bench, args: argparse.Namespace) -> Iterator[list[str]]:
    """Run all that is missing; give the cells of each line."""
    chosen = {method: bench.best(method) for method in args.only}
    for seed in range(2, args.seeds + 1):
        for method, lr in chosen.items():
            bench.run(method, lr, seed)
    yield ["method", "lr", "test accuracy %", "trained", "on disk", "time", "memory"]
    yield ["---", *["---:"] * 6]
    for method, lr in chosen.items():
        runs = [bench.run(method, lr, seed) for seed in range(1, args.seeds + 1)]
        values = [100 * run["test"] for run in runs]
        spread = f" ({min(values):.1f}-{max(values):.1f})" if len(values) > 1 else ""
        cells = [method, f"{lr:g}", f"{mean(values):.1f}{spread}"]
        cells.append(f"{runs[0]['trainable_parameters']:,}")
        cells.append(f"{runs[0]['adapter_bytes'] / 1e6:.2f} MB")
        timed = ["", ""] if args.untimed else [f"{x:.2f}" for x in bench.timed(method, lr)]
        yield [*cells, *timed]


def main() -> None:
    """Run as a script."""
    args = parse_arguments()
    for cells in table(Bench(args), args):
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()

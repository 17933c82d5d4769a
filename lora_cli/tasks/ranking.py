"""Ranking: which candidates come first for a user, given what the user liked before.

A row holds the user, a text of the history and a candidate with label 1 (clicked) or 0, or a list
of candidates with a list of labels. Each candidate is read after the history, as a pair of texts,
by the sequence classification head of transformers with one output x. The loss is binary
cross-entropy, summed over candidates, whose number is ``count``:
``loss_sum = -sum_c (label_c log s(x_c) + (1 - label_c) log(1 - s(x_c)))``, where s is the logistic
function.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from lora_cli.config.tasks import RankingConfig
from lora_cli.data import made_up
from lora_cli.data.candidates import (
    candidates_of,
    check_candidates,
    check_clicks,
    check_times,
    check_users,
    clicks_of,
    time_of,
)
from lora_cli.data.columns import canonical_label
from lora_cli.data.groups import Groups
from lora_cli.data.listing import list_rows
from lora_cli.data.passages import check_passages, passage_of
from lora_cli.data.sources import Loaded
from lora_cli.data.types import Row
from lora_cli.errors import Problem, UserError
from lora_cli.tasks.candidates import check_room, encode_pair, encoded, pad_flat, places_mask
from lora_cli.tasks.contract import Batch, Features, StepOutput
from lora_cli.tasks.rows import Columns, Role, RowFamily

CANDIDATE_COLUMNS = ("candidate", "candidates", "item", "items", "title", "news")
# Between the parts of a history that is a list.
_BETWEEN = "; "
_LABEL_COLUMNS = ("label", "labels", "clicked", "click", "target", "relevance")


@dataclass(frozen=True, slots=True)
class RankPrediction:
    """The scores of one row.

    Attributes:
        id: Row id.
        user: Whose candidates they are, or None where that is not known.
        candidates: What was scored.
        scores: The chance that each is clicked.
        labels: 1 or 0 for each candidate, or None where they are not known.
        is_list: Whether the row has a list of candidates, which is ranked.
    """

    id: str
    user: str | None
    candidates: tuple[str, ...]
    scores: tuple[float, ...]
    labels: tuple[int, ...] | None
    is_list: bool


class RankingTask:
    """Ranking bound to a configuration, columns and a tokenizer."""

    greater_is_better = True
    couples_rows = False

    def __init__(self, config: RankingConfig, state: Mapping[str, Any], tokenizer: Any) -> None:
        self.metric: str = config.metric
        self._k, self._max_length = config.k, config.max_length
        self._columns: Columns = state["columns"]
        # Its own: others cut at the end of a text.
        self._tokenizer = copy.deepcopy(tokenizer)
        self._tokenizer.truncation_side = "left"

    def encode(self, row: Row) -> Features:
        """Tokenize the history with each candidate; `labels` is None where they are not known."""
        column = self._columns["candidate"] or ""
        history = passage_of(row.values.get(self._columns["history"] or ""), between=_BETWEEN)
        candidates = candidates_of(row.values.get(column)) or ()
        pairs = [
            encode_pair(self._tokenizer, history or "", text, max_length=self._max_length)
            for text in candidates
        ]
        inputs = [one for one, _ in pairs]
        check_room(row, inputs, max_length=self._max_length, what="candidate")
        user, label = self._columns["user"], self._columns["label"]
        clicks = None if label is None else clicks_of(row.values.get(label))
        return {
            **encoded(row, inputs, cut=max(cut for _, cut in pairs)),
            "user": None if user is None else canonical_label(row.values.get(user)),
            "candidates": list(candidates),
            "is_list": isinstance(row.values.get(column), list),
            "labels": None if clicks is None else list(clicks),
            "supervised": len(clicks or ()),
        }

    def collate(self, features: Sequence[Features]) -> Batch:
        """Pad to the longest input: `inputs` (M, T) for M candidates of B rows, `labels` (M,).

        `mask` (B, N) is true where a row has a candidate, in the order of the inputs.
        """
        labels = [row["labels"] for row in features]
        known = all(row is not None for row in labels)
        return {
            "ids": [row["id"] for row in features],
            "inputs": pad_flat(self._tokenizer, features),
            "mask": places_mask([len(row["candidates"]) for row in features]),
            "labels": torch.tensor([float(x) for row in labels for x in row]) if known else None,
            "rows": [
                {name: row[name] for name in ("user", "candidates", "is_list", "labels")}
                for row in features
            ],
        }

    def forward(self, model: Callable[..., Any], batch: Batch) -> StepOutput:
        """Return the binary cross-entropy, the number of candidates and `logits` of (B, N).

        Those of places behind the candidates of a row are 0.
        """
        logits_M = model(**batch["inputs"]).logits.float().squeeze(-1)
        mask_BN, labels_M = batch["mask"], batch["labels"]
        logits_BN = logits_M.new_zeros(mask_BN.shape)
        logits_BN[mask_BN.to(logits_M.device)] = logits_M.detach()
        if labels_M is None:
            return StepOutput(logits_M.new_zeros(()), 0, {"logits": logits_BN})
        loss_sum = functional.binary_cross_entropy_with_logits(logits_M, labels_M, reduction="sum")
        return StepOutput(loss_sum, len(labels_M), {"logits": logits_BN})

    def decode(self, outputs: Mapping[str, torch.Tensor], batch: Batch) -> list[RankPrediction]:
        """Turn logits into a chance for each candidate."""
        chances_BN = outputs["logits"].cpu().double().sigmoid().tolist()
        return [
            RankPrediction(
                id=row_id,
                user=row["user"],
                candidates=tuple(row["candidates"]),
                scores=tuple(chances[: len(row["candidates"])]),
                labels=None if row["labels"] is None else tuple(row["labels"]),
                is_list=row["is_list"],
            )
            for row_id, row, chances in zip(batch["ids"], batch["rows"], chances_BN, strict=True)
        ]

    def metrics(self, predictions: Sequence[RankPrediction]) -> dict[str, float]:
        """Return auc, ndcg, hit_rate and mrr, means over users, and auc_all.

        Rows that name no user are a ranking each.
        """
        import numpy as np

        from lora_cli.metrics.ranking import ranking_metrics

        scores: dict[Any, list[float]] = {}
        labels: dict[Any, list[int]] = {}
        for place, row in enumerate(predictions):
            if row.labels is None:
                continue
            group = place if row.user is None else row.user
            scores.setdefault(group, []).extend(row.scores)
            labels.setdefault(group, []).extend(row.labels)
        groups = [(np.array(scores[name]), np.array(labels[name], bool)) for name in scores]
        return ranking_metrics(groups, k=self._k)

    def report(self, predictions: Sequence[RankPrediction]) -> dict[str, Any]:
        """Return nothing: there are no classes."""
        del predictions
        return {}

    def to_json(self, prediction: RankPrediction) -> dict[str, Any]:
        """Return id and score of a candidate, or the candidates of a list, best first.

        Of a list each has its score and rank, from 1; equal scores keep the order of the list.
        """
        line: dict[str, Any] = {"id": prediction.id}
        if prediction.user is not None:
            line["user"] = prediction.user
        labels = prediction.labels or (None,) * len(prediction.scores)
        entries: list[dict[str, Any]] = [
            {"candidate": text, "score": score} | ({} if label is None else {"reference": label})
            for text, score, label in zip(
                prediction.candidates, prediction.scores, labels, strict=True
            )
        ]
        if not prediction.is_list:
            return line | entries[0]
        ranked = sorted(entries, key=lambda entry: -entry["score"])
        return line | {"ranking": [{"rank": n, **e} for n, e in enumerate(ranked, start=1)]}


class Ranking(RowFamily):
    """The family's row in the table; its state holds ``clicked``, a share, besides the columns."""

    auto_class = "AutoModelForSequenceClassification"
    task_type: str | None = "SEQ_CLS"
    inputs = (
        Role("history", ("history", "user_history", "clicks")),
        Role("candidate", CANDIDATE_COLUMNS, made_up=made_up.second_text),
    )
    targets = (
        Role("label", _LABEL_COLUMNS, made_up=made_up.click),
        Role("user", ("user", "user_id", "uid", "userid"), True, made_up.user),
        Role("time", optional=True, made_up=made_up.time),
    )

    def check_rows(self, rows: Sequence[Row], columns: Columns) -> list[Problem]:
        """Refuse rows without history, candidate, label or user; a history may be empty."""
        candidate, label = columns["candidate"] or "", columns["label"]
        problems = check_passages(rows, columns["history"] or "", may_be_empty=True)
        problems += check_candidates(rows, candidate)
        if label is not None:
            problems += check_clicks(rows, label, candidates=candidate)
            problems += check_users(rows, columns["user"], candidates=candidate)
        return (
            problems if columns["time"] is None else problems + check_times(rows, columns["time"])
        )

    def learn(
        self, config: RankingConfig, train: Sequence[Row], loaded: Loaded, columns: Columns
    ) -> dict[str, Any]:
        """Return the share of candidates of train that were clicked.

        Raises:
            UserError: If all or none were.
        """
        del config, loaded
        label = columns["label"] or ""
        clicks = [click for row in train for click in clicks_of(row.values[label]) or ()]
        if len(set(clicks)) < 2:
            raise UserError(
                Problem(
                    id="data.one-class",
                    message="`train` must hold candidates that were clicked and others, but has "
                    f"only label {clicks[0]}.",
                    key="task.data.label_column",
                    fix="check task.data.label_column and task.data.train_split",
                )
            )
        return {"clicked": sum(clicks) / len(clicks)}

    def count_labels(self, rows: Sequence[Row], state: Mapping[str, Any]) -> dict[str, int]:
        """Return how many candidates were clicked, and how many not."""
        label = state["columns"]["label"]
        clicks = [click for row in rows for click in clicks_of(row.values[label]) or ()]
        return {"clicked": sum(clicks), "not clicked": len(clicks) - sum(clicks)}

    def check_evaluated(
        self, config: RankingConfig, rows: Sequence[Row], columns: Columns
    ) -> list[Problem]:
        """Refuse users of whom nothing was clicked, since no order of theirs is right."""
        if config.users_without_clicks == "skip":
            return []
        bad = self.groups(columns).unusable(rows)
        if not bad:
            return []
        count = "1 user has" if len(bad) == 1 else f"{len(bad)} users have"
        return [
            Problem(
                id="data.no-clicks",
                message=f"`{columns['label']}` must be 1 in a row at least of every user that is "
                f"evaluated, but {count} none.",
                where=f"{list_rows(bad)} (the user's first row)",
                key="task.users_without_clicks",
                allowed="refuse, skip",
                fix="task.users_without_clicks=skip, or remove these users",
            )
        ]

    def groups(self, columns: Columns) -> Groups:
        """Return the rows of a user as a group, by their time where there is one."""
        label, user, time = columns["label"] or "", columns["user"], columns["time"]

        def user_of(row: Row) -> str:
            return row.id if user is None else str(canonical_label(row.values.get(user)))

        def has_click(rows: Sequence[Row]) -> bool:
            return any(1 in (clicks_of(row.values.get(label)) or ()) for row in rows)

        return Groups(
            group_of=user_of,
            is_usable=has_click,
            time_of=None if time is None else lambda row: time_of(row.values.get(time)),
        )

    def describe(self, state: Mapping[str, Any]) -> str:
        """Return the share of what was clicked."""
        return f"{100 * state['clicked']:.1f} % clicked"

    def bind_columns(
        self, columns: Sequence[str], state: Mapping[str, Any], *, where: str
    ) -> Mapping[str, Any]:
        """Find the inputs; lists of candidates may be in a column of another usual name."""
        if state["columns"]["candidate"] not in columns:
            usual = [name for name in CANDIDATE_COLUMNS if name in columns]
            if usual:
                state = {**state, "columns": {**state["columns"], "candidate": usual[0]}}
        return super().bind_columns(columns, state, where=where)

    def model_options(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Return that there is one output, the logit of a click."""
        del state
        return {
            "num_labels": 1,
            "id2label": {0: "clicked"},
            "label2id": {"clicked": 0},
            "problem_type": "multi_label_classification",
        }

    def build(self, config: RankingConfig, state: Mapping[str, Any], processor: Any) -> RankingTask:
        """Bind the family; `processor` is a tokenizer."""
        return RankingTask(config, state, processor)

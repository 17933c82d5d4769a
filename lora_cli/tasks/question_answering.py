"""Extractive question answering: the part of a context that answers a question, or none.

The head is the question answering head of transformers: each token has a score as the first and one
as the last of the answer. A context that is too long is read in windows that overlap, each with the
question. The loss is cross-entropy over the tokens of the context and the place that stands for no
answer ([CLS], or the first token), of start and of end, summed over the windows of a batch:
``loss_sum = -sum_w (log softmax(start_w)[s_w] + log softmax(end_w)[e_w]) / 2``, ``count`` is the
number of windows. A window without the whole answer has none. Only where no window holds all of an
answer, each learns what it has of it, start or end, and counts by half, or neither.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from lora_cli.config.tasks import QuestionAnsweringConfig
from lora_cli.data.answers import Answer, check_answers, row_answers
from lora_cli.data.columns import check_texts
from lora_cli.data.groups import Groups
from lora_cli.data.made_up import answer_start, answers
from lora_cli.data.sources import Loaded
from lora_cli.data.types import Row
from lora_cli.errors import Problem, UserError
from lora_cli.tasks.contract import Batch, Features, StepOutput
from lora_cli.tasks.rows import Columns, Role, RowFamily, read_columns
from lora_cli.tasks.texts import pad_inputs
from lora_cli.tasks.windows import Window, WindowReader, best_spans, find_answer, trim

# What the loss passes over: cross_entropy's own default.
_IGNORED = -100
# What the logits are replaced by where no answer can be; softmax makes zero of it.
_NEVER = torch.finfo(torch.float32).min
_SIDES = ("start", "end")

# First character, character after the last, and the score of an answer.
Candidate = tuple[int, int, float]


@dataclass(frozen=True, slots=True)
class AnswerPrediction:
    """The answers of one row.

    Attributes:
        id: Row id.
        context: The text that they are parts of.
        candidates: The best answers, best first; none if the context has no tokens.
        no_answer_score: How much higher the score of having no answer is than that of the best.
        reference: The true answers, or None where they are not known.
    """

    id: str
    context: str
    candidates: tuple[Candidate, ...]
    no_answer_score: float
    reference: tuple[str, ...] | None

    @property
    def best(self) -> str:
        """The best answer, whatever the score of having none."""
        return self.context[slice(*self.candidates[0][:2])] if self.candidates else ""


class QuestionAnsweringTask:
    """Question answering bound to a configuration, columns and a tokenizer."""

    greater_is_better = True
    couples_rows = False

    def __init__(
        self, config: QuestionAnsweringConfig, state: Mapping[str, Any], tokenizer: Any
    ) -> None:
        self.metric: str = config.metric
        self._config = config
        self._columns: Columns = state["columns"]
        self._threshold = config.no_answer_threshold
        if self._threshold is None and state["unanswered"]:
            self._threshold = 0.0
        self._tokenizer = tokenizer
        self._reader = WindowReader(tokenizer, max_length=config.max_length, stride=config.stride)

    def encode(self, row: Row) -> Features:
        """Tokenize a row into windows.

        Returns:
            Besides what all features have: the `context`, the texts of the true `answers` (None
            where they are not known) and the `windows`; where answers are known each of these has
            the places to learn as `start` and `end`. The first of several answers is learned.
        """
        context = row.values[self._columns["context"] or ""]
        question = row.values[self._columns["question"] or ""].strip()
        windows, cut = self._reader.read(question, context)
        answers, supervised = self._answers(row), 0
        if answers is not None:
            labels = find_answer(windows, answers[0] if answers else None)
            supervised = sum(places != (None, None) for places in labels)
            for window, places in zip(windows, labels, strict=True):
                window |= dict(zip(_SIDES, places, strict=True))
        return {
            "id": row.id,
            "length": sum(len(window["inputs"]["input_ids"]) for window in windows),
            "cut": cut,
            "supervised": supervised,
            "context": context,
            "answers": None if answers is None else [text for text, _ in answers],
            "windows": windows,
        }

    def collate(self, features: Sequence[Features]) -> Batch:
        """Stack the windows of all rows: `inputs` and `allowed` of shape (W, T), W >= B.

        `allowed` is true where an answer may start and end; `labels` has for "start" and "end" the
        places to learn, (W,), -100 where there is nothing to learn, or is None.
        """
        windows = [window for row in features for window in row["windows"]]
        inputs = pad_inputs(self._tokenizer, windows)
        width = inputs["input_ids"].shape[1]
        allowed_WT = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
        labels: dict[str, Any] | None = None
        if all(row["answers"] is not None for row in features):
            labels = {side: torch.full((len(windows),), _IGNORED) for side in _SIDES}
        shifts = []
        for n, window in enumerate(windows):
            missing = width - len(window["inputs"]["input_ids"])
            shift = missing if self._tokenizer.padding_side == "left" else 0
            shifts.append(shift)
            allowed_WT[n, [place + shift for place in (*window["places"], window["none"])]] = True
            for side in _SIDES if labels is not None else ():
                if labels is not None and window[side] is not None:
                    labels[side][n] = window[side] + shift
        return {
            "ids": [row["id"] for row in features],
            "inputs": inputs,
            "allowed": allowed_WT,
            "labels": labels,
            "rows": list(features),
            "shifts": shifts,
        }

    def forward(self, model: Callable[..., Any], batch: Batch) -> StepOutput:
        """Return the cross-entropy, the number of windows, and the scores `start` and `end` (W, T).

        The scores are those of all tokens, as the model gives them.
        """
        found = model(**batch["inputs"])
        outputs = {"start": found.start_logits.float(), "end": found.end_logits.float()}
        loss_sum, count = outputs["start"].new_zeros(()), 0
        if (labels := batch["labels"]) is not None:
            for side, logits_WT in outputs.items():
                masked_WT = logits_WT.masked_fill(~batch["allowed"], _NEVER)
                loss_sum = loss_sum + functional.cross_entropy(
                    masked_WT, labels[side], reduction="sum", ignore_index=_IGNORED
                )
                count += int((labels[side] != _IGNORED).sum())
        return StepOutput(loss_sum / 2, count / 2, outputs)

    def decode(self, outputs: Mapping[str, torch.Tensor], batch: Batch) -> list[AnswerPrediction]:
        """Return the best answers of each row over all of its windows."""
        start_WT, end_WT = (outputs[side].float().cpu() for side in _SIDES)
        none_WT, predictions, n = start_WT + end_WT, [], 0
        for row in batch["rows"]:
            found: dict[tuple[int, int], float] = {}
            none = []
            for window in row["windows"]:
                shift = batch["shifts"][n]
                none.append(float(none_WT[n, window["none"] + shift]))
                places = [place + shift for place in window["places"]]
                for span, score in self._spans(row, window, start_WT[n, places], end_WT[n, places]):
                    found[span] = max(score, found.get(span, score))
                n += 1
            best = sorted(found.items(), key=lambda item: (-item[1], item[0]))
            candidates = tuple((*span, score) for span, score in best[: self._config.n_best])
            # A window beside the answer says that it has none: the others decide.
            top = candidates[0][2] if candidates else min(none)
            reference = None if row["answers"] is None else tuple(row["answers"])
            predictions.append(
                AnswerPrediction(row["id"], row["context"], candidates, min(none) - top, reference)
            )
        return predictions

    def _spans(
        self, row: Features, window: Window, start_C: torch.Tensor, end_C: torch.Tensor
    ) -> Iterator[tuple[tuple[int, int], float]]:
        """Yield the best answers of a window by their characters, with their scores.

        There are more than are shown, since several may be the same but for white space.
        """
        spans, length = window["spans"], self._config.max_answer_length
        count = 4 * self._config.n_best
        for first, last, score in best_spans(start_C, end_C, max_length=length, count=count):
            begin, end = trim(row["context"], spans[first][0], spans[last][1])
            if begin < end:
                yield (begin, end), score

    def metrics(self, predictions: Sequence[AnswerPrediction]) -> dict[str, float]:
        """Return exact_match and f1; with questions without an answer, what is to know of them.

        That are the scores of both kinds of questions, and the best scores that another
        `task.no_answer_threshold` would give, with it; it is not used.
        """
        from lora_cli.metrics.answers import answer_metrics, best_thresholds

        known = [(p, p.reference) for p in predictions if p.reference is not None]
        references = [true for _, true in known]
        unit = self._config.answer_unit
        metrics = answer_metrics([self._chosen(p) for p, _ in known], references, unit=unit)
        if not all(references):
            metrics |= best_thresholds(
                [p.best for p, _ in known],
                [p.no_answer_score for p, _ in known],
                references,
                unit=unit,
            )
        return metrics

    def report(self, predictions: Sequence[AnswerPrediction]) -> dict[str, Any]:
        """Return nothing: there are no classes."""
        del predictions
        return {}

    def to_json(self, prediction: AnswerPrediction) -> dict[str, Any]:
        """Return id, answer with its place and score, the n best, and the true answers if known.

        Places are counted in characters of the context: the answer is ``context[start:end]``. It is
        empty, without a place and a score, where there is none. A score is the sum of the logits of
        first and last token.
        """
        listed = [
            {"text": prediction.context[start:end], "start": start, "end": end, "score": score}
            for start, end, score in prediction.candidates
        ]
        chosen = listed[0] if self._chosen(prediction) else {}
        line: dict[str, Any] = {
            "id": prediction.id,
            "answer": chosen.get("text", ""),
            **{name: chosen.get(name) for name in ("start", "end", "score")},
            "no_answer_score": prediction.no_answer_score,
            "n_best": listed,
        }
        if prediction.reference is not None:
            line["reference"] = list(prediction.reference)
        return line

    def _answers(self, row: Row) -> tuple[Answer, ...] | None:
        column = self._columns["answers"]
        if column is None:
            return None
        return row_answers(row, column, self._columns["answer_start"])

    def _chosen(self, prediction: AnswerPrediction) -> str:
        if self._threshold is not None and prediction.no_answer_score > self._threshold:
            return ""
        return prediction.best


class QuestionAnswering(RowFamily):
    """The family's row in the table."""

    auto_class = "AutoModelForQuestionAnswering"
    # The wrapper that PEFT has for QUESTION_ANS passes no token types on to the model.
    task_type: str | None = None
    inputs = (Role("question", ("question", "query")), Role("context", ("context", "passage")))
    targets = (
        Role("answers", ("answers", "answer", "answer_text"), made_up=answers),
        Role("answer_start", ("answer_start",), optional=True, made_up=answer_start),
    )

    def check_rows(self, rows: Sequence[Row], columns: Columns) -> list[Problem]:
        """Refuse rows without question or context, and answers that the context does not have."""
        problems = [
            p for column in read_columns(self.inputs, columns) for p in check_texts(rows, column)
        ]
        if columns["answers"] is None:
            return problems
        return problems + check_answers(
            rows,
            context=columns["context"] or "",
            answers=columns["answers"],
            start=columns["answer_start"],
        )

    def learn(
        self,
        config: QuestionAnsweringConfig,
        train: Sequence[Row],
        loaded: Loaded,
        columns: Columns,
    ) -> dict[str, Any]:
        """Return the number of rows with an answer, ``answered``, and without, ``unanswered``.

        Raises:
            UserError: If all have none.
        """
        del config, loaded
        column, start = columns["answers"] or "", columns["answer_start"]
        answered = sum(bool(row_answers(row, column, start)) for row in train)
        if not answered:
            raise UserError(
                Problem(
                    id="data.no-answers",
                    message="`train` must hold questions with an answer, but has none.",
                    key="task.data.answers_column",
                    fix="check task.data.answers_column and task.data.train_split",
                )
            )
        return {"answered": answered, "unanswered": len(train) - answered}

    def groups(self, columns: Columns) -> Groups:
        """Return that a cut keeps the questions about a context together."""
        context = columns["context"] or ""
        return Groups(
            group_of=lambda row: str(row.values.get(context)),
            is_usable=bool,
            what="contexts",
            stay_whole=False,
        )

    def describe(self, state: Mapping[str, Any]) -> str:
        """Say how many questions have no answer."""
        without, total = state["unanswered"], state["answered"] + state["unanswered"]
        return f"{without:,} of {total:,} questions of train without an answer" if without else ""

    def model_options(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Return that there are two outputs a token, start and end."""
        del state
        return {"num_labels": 2}

    def build(
        self, config: QuestionAnsweringConfig, state: Mapping[str, Any], processor: Any
    ) -> QuestionAnsweringTask:
        """Bind the family; `processor` is a tokenizer that tells where a token is in its text."""
        return QuestionAnsweringTask(config, state, processor)

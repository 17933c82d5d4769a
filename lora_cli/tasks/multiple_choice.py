"""Multiple choice: which of some choices is the right one, given a text, a question or both.

The head is the multiple choice head of transformers: one number x for each choice, read after the
text it is the choice for. The loss is cross-entropy over the choices of a row, summed over rows:
``loss_sum = -sum_b log softmax(x_b)[answer_b]``, ``count`` is the number of rows. Rows may have
different numbers of choices.

A choice is the second part of its input, after the question where there is a context too; the
first part is the context, or else the question.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from lora_cli.config.tasks import DataConfig, MultipleChoiceConfig
from lora_cli.data import made_up
from lora_cli.data.choices import (
    answer_index,
    check_answers,
    check_choices,
    choices_of,
    learn_kind,
    numbered_columns,
)
from lora_cli.data.columns import resolve_column
from lora_cli.data.passages import check_passages, passage_of
from lora_cli.data.sources import Loaded
from lora_cli.data.types import Row
from lora_cli.errors import Problem, UserError
from lora_cli.tasks.candidates import check_room, encode_pair, encoded, pad_choices, places_mask
from lora_cli.tasks.contract import Batch, Features, StepOutput
from lora_cli.tasks.rows import Columns, Role, RowFamily, raise_if

CONTEXT_COLUMNS = ("context", "article", "passage", "document", "sent1", "ctx", "premise", "story")
QUESTION_COLUMNS = ("question", "sent2", "query", "goal", "stem")
CHOICES_COLUMNS = ("choices", "options", "endings", "choice", "candidates")
ANSWER_COLUMNS = ("answer", "label", "answerkey", "answer_key", "correct", "gold", "answer_index")
# One of several columns with a choice each is the role "choice 0", "choice 1", ...
_CHOICE = "choice "


@dataclass(frozen=True, slots=True)
class ChoicePrediction:
    """The choice in one row.

    Attributes:
        id: Row id.
        index: Which choice has the highest probability, counted from 0.
        choices: The texts of all of them.
        probabilities: One for each choice.
        reference: Which choice is right, or None where that is not known.
    """

    id: str
    index: int
    choices: tuple[str, ...]
    probabilities: tuple[float, ...]
    reference: int | None


class MultipleChoiceTask:
    """Multiple choice bound to a configuration, columns and a tokenizer."""

    greater_is_better = True
    couples_rows = False

    def __init__(
        self, config: MultipleChoiceConfig, state: Mapping[str, Any], tokenizer: Any
    ) -> None:
        self.metric: str = config.metric
        self._max_length = config.max_length
        self._columns: Columns = state["columns"]
        self._answers: str = state["answers"]
        self._tokenizer = tokenizer

    def encode(self, row: Row) -> Features:
        """Tokenize each choice after context and question; `answer` is None where not known."""
        found = choices_of(row, choice_columns(self._columns))
        texts = () if found is None else found.texts
        pairs = self._encode(row, texts)
        inputs = [one for one, _ in pairs]
        check_room(row, inputs, max_length=self._max_length, what="choice")
        column = self._columns["answer"]
        answer = None
        if column is not None and found is not None:
            answer = answer_index(row.values[column], found, self._answers)
        features = encoded(row, inputs, cut=max(cut for _, cut in pairs))
        supervised = int(answer is not None)
        return {**features, "choices": list(texts), "answer": answer, "supervised": supervised}

    def _encode(self, row: Row, texts: Sequence[str]) -> list[tuple[dict[str, Any], int]]:
        context, question = (
            None if column is None else passage_of(row.values.get(column))
            for column in (self._columns["context"], self._columns["question"])
        )

        def encode(first: str, start: str) -> list[tuple[dict[str, Any], int]]:
            seconds = [f"{start} {text}" if start else text for text in texts]
            return [
                encode_pair(self._tokenizer, first, second, max_length=self._max_length)
                for second in seconds
            ]

        if context is None or question is None:
            return encode(context or question or "", "")
        pairs = encode(context, question)
        if max(len(one["input_ids"]) for one, _ in pairs) <= self._max_length:
            return pairs
        # Without the context the question is what can be cut, for all choices alike.
        lost = len(self._tokenizer(context, add_special_tokens=False)["input_ids"])
        return [(one, cut + lost) for one, cut in encode(question, "")]

    def collate(self, features: Sequence[Features]) -> Batch:
        """Pad to the longest choice and to most choices: `inputs` (B, N, T), `mask` (B, N)."""
        answers = [row["answer"] for row in features]
        known = all(answer is not None for answer in answers)
        return {
            "ids": [row["id"] for row in features],
            "inputs": pad_choices(self._tokenizer, features),
            "mask": places_mask([len(row["choices"]) for row in features]),
            "choices": [row["choices"] for row in features],
            "answers": torch.tensor(answers) if known else None,
        }

    def forward(self, model: Callable[..., Any], batch: Batch) -> StepOutput:
        """Return the cross-entropy, the number of rows and `logits` of shape (B, N).

        Those of places behind the choices of a row mean nothing.
        """
        logits_BN = model(**batch["inputs"]).logits.float()
        answers_B = batch["answers"]
        if answers_B is None:
            return StepOutput(logits_BN.new_zeros(()), 0, {"logits": logits_BN})
        masked_BN = logits_BN.masked_fill(~batch["mask"], -torch.inf)
        loss_sum = functional.cross_entropy(masked_BN, answers_B, reduction="sum")
        return StepOutput(loss_sum, len(answers_B), {"logits": logits_BN})

    def decode(self, outputs: Mapping[str, torch.Tensor], batch: Batch) -> list[ChoicePrediction]:
        """Turn logits into probabilities over the choices of each row."""
        logits_BN, answers = outputs["logits"].cpu().double(), batch["answers"]
        references = [None] * len(logits_BN) if answers is None else answers.tolist()
        predictions = []
        for row, logits_N in enumerate(logits_BN):
            choices = tuple(batch["choices"][row])
            probabilities = logits_N[: len(choices)].softmax(dim=0)
            predictions.append(
                ChoicePrediction(
                    id=batch["ids"][row],
                    index=int(probabilities.argmax()),
                    choices=choices,
                    probabilities=tuple(probabilities.tolist()),
                    reference=references[row],
                )
            )
        return predictions

    def metrics(self, predictions: Sequence[ChoicePrediction]) -> dict[str, float]:
        """Return accuracy: the share of rows whose choice is right; 0 for no rows."""
        known = [p for p in predictions if p.reference is not None]
        right = sum(p.index == p.reference for p in known)
        return {"accuracy": right / len(known) if known else 0.0}

    def report(self, predictions: Sequence[ChoicePrediction]) -> dict[str, Any]:
        """Return nothing: choices of different rows are no classes."""
        del predictions
        return {}

    def to_json(self, prediction: ChoicePrediction) -> dict[str, Any]:
        """Return id, which choice it is (from 0), its text and the probability of each."""
        line: dict[str, Any] = {
            "id": prediction.id,
            "index": prediction.index,
            "text": prediction.choices[prediction.index],
            "probabilities": list(prediction.probabilities),
        }
        if prediction.reference is not None:
            line["reference"] = prediction.reference
        return line


class MultipleChoice(RowFamily):
    """The family's row in the table.

    Its state holds ``answers``, how these are written, and ``choices``, the least and the largest
    number of them in a row of train, besides the columns.
    """

    auto_class = "AutoModelForMultipleChoice"
    # PEFT has no name for it.
    task_type: str | None = None
    inputs = (
        Role("context", CONTEXT_COLUMNS, optional=True),
        Role("question", QUESTION_COLUMNS, optional=True),
        Role("choices", CHOICES_COLUMNS, optional=True, made_up=made_up.choices),
    )
    targets = (Role("answer", ANSWER_COLUMNS, made_up=made_up.answer),)

    def made_up_rows(self, config: MultipleChoiceConfig, count: int) -> list[dict[str, Any]]:
        """Return rows with the columns of the settings, several of choices too."""
        rows, names = super().made_up_rows(config, count), config.data.choice_columns
        if names is None:
            return rows
        return [{**row, **dict(zip(names, row[CHOICES_COLUMNS[0]], strict=True))} for row in rows]

    def check_rows(self, rows: Sequence[Row], columns: Columns) -> list[Problem]:
        """Refuse rows without text to choose for, or without two choices."""
        texts = [columns[name] for name in ("context", "question")]
        problems = [p for column in texts if column for p in check_passages(rows, column)]
        return problems + check_choices(rows, choice_columns(columns))

    def learn(
        self,
        config: MultipleChoiceConfig,
        train: Sequence[Row],
        loaded: Loaded,
        columns: Columns,
    ) -> dict[str, Any]:
        """Return how the answers are written, and how many choices there are.

        Raises:
            UserError: If the answers can be read in several ways.
        """
        del loaded
        names, answer = choice_columns(columns), columns["answer"] or ""
        counts = [len(found.texts) for row in train if (found := choices_of(row, names))]
        kind = config.answers
        return {
            "answers": learn_kind(train, names, answer) if kind == "auto" else kind,
            "choices": [min(counts), max(counts)],
        }

    def check_known(self, rows: Sequence[Row], state: Mapping[str, Any]) -> list[Problem]:
        """Return a problem for answers that are none of the choices."""
        columns, answer = state["columns"], state["columns"]["answer"]
        return check_answers(rows, choice_columns(columns), answer, kind=state["answers"])

    def describe(self, state: Mapping[str, Any]) -> str:
        """Return the number of choices, and how the answers are written."""
        least, most = state["choices"]
        count = str(least) if least == most else f"{least} to {most}"
        return f"{count} choices a row, answers by {state['answers']}"

    def bind_columns(
        self, columns: Sequence[str], state: Mapping[str, Any], *, where: str
    ) -> Mapping[str, Any]:
        """Find the inputs among the columns of rows to predict, several columns of choices too."""
        missing = [name for name in choice_columns(state["columns"]) if name not in columns]
        if missing and state["columns"]["choices"] is None:
            raise UserError(
                Problem(
                    id="data.missing-column",
                    message=f'The rows must have the column "{missing[0]}", which the adapter '
                    "was trained on, but have not.",
                    where=where,
                    allowed=", ".join(columns),
                    fix=f"rename the column with the choice to {missing[0]}",
                )
            )
        return super().bind_columns(columns, state, where=where)

    def model_options(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Return nothing: the head has one output whatever the number of choices."""
        del state
        return {}

    def build(
        self, config: MultipleChoiceConfig, state: Mapping[str, Any], processor: Any
    ) -> MultipleChoiceTask:
        """Bind the family; `processor` is a tokenizer."""
        return MultipleChoiceTask(config, state, processor)

    def input_columns(self, columns: Columns) -> list[str]:
        """Return the columns of all inputs."""
        texts = [columns[name] for name in ("context", "question")]
        return [name for name in (*texts, *choice_columns(columns)) if name]

    def _resolve(self, data: DataConfig, columns: Sequence[str]) -> tuple[Columns, list[str]]:
        """Find the choices in one column or in several, and something to choose for."""
        given = data.choice_columns
        if given is not None and data.choices_column is not None:
            raise UserError(_two_ways(given, data.choices_column))
        found, notes = super()._resolve(data, columns)
        key = "task.data.choice_columns"
        if given is not None:
            notes = [note for note in notes if not note.startswith("choices:")]
            found = {**found, "choices": None}
            for name in given:
                resolve_column(columns, name, known=(), key=key)
        problems = []
        if found["choices"] is None:
            names = given or numbered_columns(columns)
            if given is None and names:
                notes.append(f"choices: columns {', '.join(names)} (numbered ones)")
            found = {**found, **{f"{_CHOICE}{n}": name for n, name in enumerate(names)}}
            if len(set(names)) < 2 or len(set(names)) < len(names):
                problems.append(_no_choices(names, columns))
        if found["context"] is None and found["question"] is None:
            problems.append(_no_text(columns))
        raise_if(problems)
        return found, notes


def choice_columns(columns: Columns) -> tuple[str, ...]:
    """Return the one column with lists of choices, or the several with one choice each."""
    if columns["choices"] is not None:
        return (columns["choices"],)
    numbered = sorted(
        (int(role.removeprefix(_CHOICE)), name)
        for role, name in columns.items()
        if role.startswith(_CHOICE) and name is not None
    )
    return tuple(name for _, name in numbered)


def _two_ways(names: Sequence[str], column: str) -> Problem:
    return Problem(
        id="data.two-kinds-of-choices",
        message="`task.data.choice_columns` must be left out with task.data.choices_column, which "
        f"names one column with all choices, but is {', '.join(names)} besides {column}.",
        key="task.data.choice_columns",
        fix="give one of the two",
    )


def _no_choices(names: Sequence[str], columns: Sequence[str]) -> Problem:
    finding = f"names {', '.join(names)}" if names else "is not given, and no usual name is there"
    return Problem(
        id="data.no-choices",
        message="`task.data.choice_columns` must name two or more different columns, or "
        f"task.data.choices_column one with a list, but {finding}.",
        key="task.data.choice_columns",
        allowed=", ".join(columns),
        fix="task.data.choices_column=NAME, or task.data.choice_columns=[NAME,NAME]",
    )


def _no_text(columns: Sequence[str]) -> Problem:
    return Problem(
        id="data.no-question",
        message="`task.data.context_column` or task.data.question_column must name what the "
        "choices are for, but no usual name is there.",
        key="task.data.context_column",
        allowed=", ".join(columns),
        fix="task.data.context_column=NAME, task.data.question_column=NAME, or both",
    )

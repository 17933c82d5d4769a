"""Choice among answers by likelihood: a decoder says which answer goes best with a prompt.

There is one answer for each label. The score of an answer is the sum of the log-probabilities of
its tokens behind the prompt, divided by their number, by its characters, or by nothing; the label
with the largest is predicted. Probabilities are softmax over the scores.

What is trained is the right answer: cross-entropy summed over its tokens, ``count`` is their
number. The wrong ones are not looked at in training, so that a step costs one pass for each row,
however many labels there are, and the model stays a language model. No head is added.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from lora_cli.config.language import AnswerSettings
from lora_cli.data.columns import canonical_label, check_labels
from lora_cli.data.made_up import sentence
from lora_cli.data.prompts import check_places, fill, places_of
from lora_cli.data.types import Row
from lora_cli.errors import Problem
from lora_cli.tasks.contract import Batch, Features, StepOutput
from lora_cli.tasks.labels import LabelFamily, indices_of
from lora_cli.tasks.language import collate_sequences, next_token_loss
from lora_cli.tasks.rows import Columns, raise_if, read_columns
from lora_cli.tasks.single_label import LabelPrediction, SingleLabelTask
from lora_cli.tasks.texts import LABEL, TEXTS, text_problems

# Places of a prompt that stand for a column by what it is for.
_ROLES = tuple(role.name for role in TEXTS)


class AnswerChoiceTask(SingleLabelTask):
    """Choice among answers bound to a configuration, label names and a tokenizer."""

    def __init__(self, config: AnswerSettings, state: Mapping[str, Any], tokenizer: Any) -> None:
        self.metric: str = config.metric
        self._config = config
        self._labels: tuple[str, ...] = tuple(state["labels"])
        self._columns: Columns = state["columns"]
        self._indices = indices_of(state)
        self._tokenizer = tokenizer
        self._answers = [config.answers.get(label, label) for label in self._labels]

    def encode(self, row: Row) -> Features:
        """Tokenize the prompt with each of the answers.

        Returns:
            Besides what all features have, ``sequences``, one for each label, whose ``spans`` are
            the answers, and ``label``, the index of the right one, or None where it is not known.
        """
        index, prompt = self.label_of(row), self.prompt_of(row)
        gap = "" if prompt[-1:].isspace() else " "
        wholes = [self._tokens(f"{prompt}{gap}{answer}") for answer in self._answers]
        told = self._tokens(prompt)
        start = min(_shared(told, whole) for whole in wholes)
        cut = max(0, max(map(len, wholes)) - self._config.max_length)
        sequences: list[dict[str, list[Any]]] = []
        for whole in wholes:
            kept = self._without(whole, cut, before=start)
            first = len(kept) - (len(whole) - start)
            sequences.append({"input_ids": kept, "spans": [[first, len(kept)]]})
        lengths = [len(one["input_ids"]) for one in sequences]
        return {
            "id": row.id,
            "length": sum(lengths) if index is None else lengths[index],
            "cut": cut,
            "supervised": 0 if index is None else len(wholes[index]) - start,
            "sequences": sequences,
            "label": index,
        }

    def collate(self, features: Sequence[Features]) -> Batch:
        """Stack prompts with answers, those of a row behind each other; `labels` (B,) or None."""
        batch = collate_sequences(features, padding=self._tokenizer.pad_token_id)
        labels = [row["label"] for row in features]
        known = all(label is not None for label in labels)
        return {**batch, "labels": torch.tensor(labels) if known else None}

    def forward(self, model: Callable[..., Any], batch: Batch) -> StepOutput:
        """Return the loss of the right answers, the number of their tokens, and the scores.

        In training the right answers alone are run. Otherwise the output is ``scores`` (B, C).
        """
        learned_WT, labels_B = batch["learned"], batch["labels"]
        right_B = None if labels_B is None else self.right_lines(labels_B)
        if "seed" in batch and right_B is not None:
            lines = {name: value[right_B] for name, value in batch["inputs"].items()}
            return next_token_loss(
                model, {"inputs": lines, "learned": learned_WT[right_B], "seed": batch["seed"]}
            )
        return self.scored(next_token_loss(model, batch).outputs["log_probs"], batch)

    def scored(self, said_WT2: torch.Tensor, batch: Batch) -> StepOutput:
        """Return loss, count and scores, given the log-probabilities of all answers' tokens."""
        said_WT, learned_WT = said_WT2[..., 0], batch["learned"]
        scores_W = said_WT.sum(dim=1) / self._sizes(learned_WT).to(said_WT.device)
        loss_sum, count = said_WT.new_zeros(()), 0
        if batch["labels"] is not None:
            right_B = self.right_lines(batch["labels"])
            loss_sum, count = -said_WT[right_B].sum(), int(learned_WT[right_B].sum())
        return StepOutput(loss_sum, count, {"scores": scores_W.view(-1, len(self._labels))})

    def right_lines(self, labels_B: torch.Tensor) -> torch.Tensor:
        """Return where the right answer of each row is among those of all rows, (B,)."""
        first_B = torch.arange(len(labels_B), device=labels_B.device) * len(self._labels)
        return first_B + labels_B

    def decode(self, outputs: Mapping[str, torch.Tensor], batch: Batch) -> list[LabelPrediction]:
        """Turn scores into labels and probabilities."""
        return super().decode({"logits": outputs["scores"]}, batch)

    def label_of(self, row: Row) -> int | None:
        """Return the index of the label of a row, None where it is not known."""
        column = self._columns["label"]
        label = None if column is None else canonical_label(row.values[column])
        return None if label is None else self._indices[label]

    def prompt_of(self, row: Row) -> str:
        """Return the prompt with the values of a row."""
        named = ((role, self._columns[role]) for role in _ROLES)
        by_role = {role: row.values[column] for role, column in named if column is not None}
        return fill(self._config.prompt, {**row.values, **by_role})

    def _tokens(self, text: str) -> list[int]:
        ids = list(self._tokenizer(text)["input_ids"])
        return ids[:-1] if ids[-1:] == [self._tokenizer.eos_token_id] else ids

    def _without(self, ids: list[int], cut: int, *, before: int) -> list[int]:
        """Leave out the first `cut` tokens of a prompt, but for the one that begins all texts."""
        kept = int(ids[0] == self._tokenizer.bos_token_id and before > 1)
        # An answer that is too long itself leaves one token of the prompt.
        most = max(0, min(cut, before - kept - 1))
        return ids[:kept] + ids[kept + most :]

    def _sizes(self, learned_WT: torch.Tensor) -> torch.Tensor:
        """Return what the sum of each line is divided by, (W,)."""
        if self._config.normalize == "tokens":
            return learned_WT.sum(dim=1).clamp(min=1)
        lengths = [1] * len(self._answers)
        if self._config.normalize == "characters":
            lengths = [len(answer) for answer in self._answers]
        return torch.tensor(lengths).repeat(len(learned_WT) // len(lengths))


class AnswerChoice(LabelFamily):
    """The family's row in the table."""

    auto_class = "AutoModelForCausalLM"
    task_type: str | None = "CAUSAL_LM"
    inputs, targets = TEXTS, (LABEL,)

    def made_up_rows(self, config: AnswerSettings, count: int) -> list[dict[str, Any]]:
        """Return rows with the columns of the settings, and those that the prompt names."""
        rows = super().made_up_rows(config, count)
        named = [name for name in places_of(config.prompt) if name not in _ROLES]
        return [{**dict.fromkeys(named, sentence(n)), **row} for n, row in enumerate(rows)]

    def check_rows(self, rows: Sequence[Row], columns: Columns) -> list[Problem]:
        """Refuse rows without text, and labels that are none."""
        problems, column = text_problems(rows, columns), columns["label"]
        return problems if column is None else problems + check_labels(rows, column)

    def check_known(self, rows: Sequence[Row], state: Mapping[str, Any]) -> list[Problem]:
        """Refuse labels that train does not have, and rows without what the prompt asks for."""
        return [*super().check_known(rows, state), *check_places(rows, state["places"])]

    def check_row(self, row: Row, state: Mapping[str, Any]) -> None:
        """Refuse a row whose prompt cannot be written."""
        super().check_row(row, state)
        raise_if(check_places((row,), state["places"]))

    def labels_of(self, value: Any) -> tuple[str, ...]:
        """Return the one label."""
        return (str(canonical_label(value)),)

    def learn(
        self, config: AnswerSettings, train: Sequence[Row], loaded: Any, columns: Columns
    ) -> dict[str, Any]:
        """Return ``labels`` and ``numbered``, and ``places``, the columns that the prompt names.

        Raises:
            UserError: If the prompt does not use the texts, or answers are not those of the labels.
        """
        found = super().learn(config, train, loaded, columns)
        names = places_of(config.prompt)
        raise_if(_prompt_problems(names, columns))
        raise_if(_answer_problems(config.answers, found["labels"]))
        return {**found, "places": [name for name in names if name not in _ROLES]}

    def model_options(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Return nothing: the head has an output for each token of the vocabulary."""
        del state
        return {}

    def input_columns(self, columns: Columns) -> list[str]:
        """Return the columns of the texts."""
        return read_columns(TEXTS, columns)

    def stratum(self, row: Row, columns: Columns) -> Any:
        """Return the label."""
        return row.values.get(columns["label"] or "")

    def build(
        self, config: AnswerSettings, state: Mapping[str, Any], processor: Any
    ) -> AnswerChoiceTask:
        """Bind the family; `processor` is a tokenizer."""
        return AnswerChoiceTask(config, state, processor)


def _shared(first: Sequence[int], second: Sequence[int]) -> int:
    """Return how many tokens two texts begin with alike."""
    pairs = zip(first, second, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def _prompt_problems(names: Sequence[str], columns: Columns) -> list[Problem]:
    """Return a problem for each text that has no place in the prompt, or is not there for one."""
    problems = []
    for role in _ROLES:
        has_column = columns[role] is not None
        if has_column == (role in names) or (role == "text" and set(names) - set(_ROLES)):
            continue
        finding = f"has no {{{role}}}" if has_column else f"has {{{role}}} without such a column"
        problems.append(
            Problem(
                id="task.bad-prompt",
                message=f"`task.prompt` must have a place for each text of a row, but {finding}.",
                key="task.prompt",
                allowed=", ".join(f"{{{name}}}" for name in _ROLES if columns[name] is not None)
                + ", and {NAME} for any column",
                fix=f"task.prompt={{{role}}}..." if has_column else f"task.data.{role}_column=NAME",
            )
        )
    return problems


def _answer_problems(answers: Mapping[str, str], labels: Sequence[str]) -> list[Problem]:
    if not answers:
        return []
    unknown = [label for label in answers if label not in labels]
    missing = [label for label in labels if label not in answers]
    texts = [answers[label].strip() for label in labels if label in answers]
    if not unknown and not missing and all(texts) and len(set(texts)) == len(texts):
        return []
    finding = "two labels have the same, or an empty one"
    if unknown or missing:
        finding = f'"{(unknown or missing)[0]}" ' + ("is no label" if unknown else "has none")
    return [
        Problem(
            id="task.bad-answers",
            message=f"`task.answers` must have a text of its own for each label, but {finding}.",
            key="task.answers",
            allowed=", ".join(labels[:20]),
            fix="task.answers={" + ", ".join(f'"{label}": TEXT' for label in labels[:3]) + "}",
        )
    ]

"""Choice among answers by likelihood, by an encoder that reads the prompt and a decoder.

Scores, loss and prompts are those of `lora_cli.tasks.answer_choice`; the likelihood of an answer is
that of all its tokens and of the end token, as a target of `lora_cli.tasks.seq2seq`. Shapes: C
answers for each of B rows, S tokens of a prompt, T tokens of an answer.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from lora_cli.config.language import AnswerSettings, Seq2SeqConfig
from lora_cli.data.types import Row
from lora_cli.tasks.answer_choice import AnswerChoice, AnswerChoiceTask
from lora_cli.tasks.contract import Batch, Features, StepOutput
from lora_cli.tasks.seq2seq import IGNORED, Seq2SeqTask


class AnswerChoiceSeq2SeqTask(AnswerChoiceTask):
    """Choice among answers bound to a configuration, label names and a tokenizer."""

    def __init__(self, config: AnswerSettings, state: Mapping[str, Any], tokenizer: Any) -> None:
        super().__init__(config, state, tokenizer)
        columns = {"columns": {"source": None, "target": None}}
        plain = Seq2SeqConfig(generate_in_eval=False, metric="loss")
        self._pairs = Seq2SeqTask(plain, columns, tokenizer)
        wholes = [tokenizer(text_target=answer)["input_ids"] for answer in self._answers]
        self._targets = [list(whole) for whole in wholes]

    def encode(self, row: Row) -> Features:
        """Tokenize the prompt: `source`, whose first tokens are cut if it is too long."""
        index = self.label_of(row)
        source = list(self._tokenizer(self.prompt_of(row))["input_ids"])
        room = self._config.max_length - max(map(len, self._targets))
        cut = min(max(0, len(source) - room), len(source) - 1)
        kept = source[cut:]
        return {
            "id": row.id,
            "length": len(kept),
            "cut": cut,
            "supervised": 0 if index is None else len(self._targets[index]),
            "source": kept,
            "label": index,
        }

    def collate(self, features: Sequence[Features]) -> Batch:
        """Stack prompts (B, S), and the answers of each row (B C, T), behind each other."""
        source = [{"input_ids": row["source"]} for row in features]
        inputs = self._tokenizer.pad(source, padding_side="right", return_tensors="pt")
        width = max(map(len, self._targets))
        full = [[*one, *[IGNORED] * (width - len(one))] for one in self._targets]
        targets_WT = torch.tensor(full).repeat(len(features), 1)
        labels = [row["label"] for row in features]
        known = all(label is not None for label in labels)
        return {
            "ids": [row["id"] for row in features],
            "inputs": {name: inputs[name] for name in ("input_ids", "attention_mask")},
            "targets": targets_WT,
            "learned": targets_WT != IGNORED,
            "labels": torch.tensor(labels) if known else None,
        }

    def forward(self, model: Callable[..., Any], batch: Batch) -> StepOutput:
        """Return the loss of the right answers, the number of their tokens, and the scores.

        In training the right answers alone are run. Otherwise the output is ``scores`` (B, C).
        """
        inputs, targets_WT, labels_B = batch["inputs"], batch["targets"], batch["labels"]
        if "seed" in batch and labels_B is not None:
            right = {"inputs": inputs, "labels": targets_WT[self.right_lines(labels_B)]}
            return self._pairs.score_targets(model, {**right, "seed": batch["seed"]})
        count = len(self._labels)
        repeated = {name: value.repeat_interleave(count, dim=0) for name, value in inputs.items()}
        found = self._pairs.score_targets(model, {"inputs": repeated, "labels": targets_WT})
        return self.scored(found.outputs["log_probs"], batch)


class AnswerChoiceSeq2Seq(AnswerChoice):
    """The family's row in the table."""

    auto_class = "AutoModelForSeq2SeqLM"
    task_type: str | None = "SEQ_2_SEQ_LM"

    def build(
        self, config: AnswerSettings, state: Mapping[str, Any], processor: Any
    ) -> AnswerChoiceSeq2SeqTask:
        """Bind the family; `processor` is a tokenizer."""
        return AnswerChoiceSeq2SeqTask(config, state, processor)

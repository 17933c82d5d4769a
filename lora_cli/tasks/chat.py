"""Chat: a decoder learns what an assistant answers, in one turn or several.

A conversation is written by the chat template of the model (see `lora_cli.tasks.chat_template`).
The loss is cross-entropy over the tokens that the assistant writes, the end of each turn included
(see `lora_cli.tasks.language`). On request, evaluations also answer the last question, and compare
the answers with the true ones.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_cli.data.messages import (
    Message,
    check_messages,
    made_up_rows,
    one_layout,
    read_documents,
    read_messages,
)
from lora_cli.data.sources import Loaded
from lora_cli.data.templates import BUILT_IN, read_template
from lora_cli.data.types import Row
from lora_cli.errors import Problem, UserError
from lora_cli.models.processors import tokenizer_of
from lora_cli.tasks.chat_refusals import (
    NOT_GENERATED,
    needs_answers,
    no_layout,
    no_question,
    not_written,
    too_long,
)
from lora_cli.tasks.chat_template import ChatTemplate, Refused
from lora_cli.tasks.contract import Batch, Features, StepOutput
from lora_cli.tasks.generation import generate, have_ended
from lora_cli.tasks.language import (
    collate_sequences,
    next_token_loss,
    supervised,
    training_lines,
)
from lora_cli.tasks.rows import Columns, Role, RowFamily, raise_if
from lora_cli.tasks.written import WrittenText, written_metrics, written_outputs, written_texts

Inputs = Callable[[Any], Mapping[str, torch.Tensor]]


class ChatTask:
    """Chat bound to a configuration, columns and a tokenizer with a template."""

    couples_rows = False
    template: type[ChatTemplate] = ChatTemplate
    """What writes conversations."""

    def __init__(self, config: Any, state: Mapping[str, Any], processor: Any) -> None:
        self.metric: str = config.metric
        self.greater_is_better = config.metric != "perplexity"
        self._config = config
        self._columns: Columns = state["columns"]
        self._is_answering = bool(state.get("answering"))
        self._tokenizer = tokenizer_of(processor)
        self._template = self.template(processor, state["chat_template"])
        self._generation = config.generation
        if not self._template.end_ids and self._template.end_text.strip():
            stop = (*config.generation.stop, self._template.end_text.strip())
            self._generation = dataclasses.replace(config.generation, stop=stop)

    def encode(self, row: Row) -> Features:
        """Write a conversation by the template.

        Returns:
            Besides what all features have: its one sequence, ``sequences``; where an answer is to
            be generated, the tokens of the ``prompt`` and the true answer in ``references``; and
            ``left_out`` where the conversation is too long and such are not to be used.

        Raises:
            UserError: If the template does not write it, or it is too long.
        """
        messages = self._with_system(
            read_messages(row, self._columns, answering=self._is_answering)
        )
        documents = read_documents(row, self._columns["documents"])
        try:
            if self._is_answering:
                return self._question(row, self._template.prompt(messages, documents), None)
            ids, spans = self._template.read(messages, documents)
            features = self._whole(row, ids, spans)
            if self._config.generate_in_eval:
                last = last_answer(messages)
                prompt = self._template.prompt(messages[:last], documents)
                asked = self._question(row, prompt, str(messages[last]["content"]))
                features |= {name: asked[name] for name in ("prompt", "references")}
        except Refused as refused:
            raise UserError(not_written(row, refused)) from refused
        return features

    def collate(self, features: Sequence[Features]) -> Batch:
        """Stack conversations, each padded at its right; `prompts` are those to be answered."""
        batch = collate_sequences(features, padding=self._tokenizer.pad_token_id)
        return {**batch, "prompts": [row.get("prompt") for row in features], "rows": list(features)}

    def forward(self, model: Callable[..., Any], batch: Batch) -> StepOutput:
        """Return the loss of the assistant's tokens; outside of training, generate if asked to.

        The outputs are those of `next_token_loss` and of `written_outputs`.
        """
        if not self._is_answering:
            found = next_token_loss(model, batch, more=self._inputs_of_lines(model, batch))
            is_scored_only = "seed" in batch or not batch.get("generate", True)
            if is_scored_only or not self._config.generate_in_eval:
                return found
        else:
            found = StepOutput(torch.zeros(()), 0, {})
        written = generate(
            model,
            self._tokenizer,
            batch["prompts"],
            self._generation,
            ids=batch["ids"],
            options={"eos_token_id": self._template.end_ids},
            on_text=batch.get("on_text"),
            more=self._inputs_of_prompts(model, batch),
        )
        ended = have_ended(
            model, self._tokenizer, written, self._generation, end_ids=self._template.end_ids
        )
        answers = written_outputs(written, ended, device=batch["inputs"]["input_ids"].device)
        return StepOutput(found.loss_sum, found.count, {**found.outputs, **answers})

    def decode(self, outputs: Mapping[str, torch.Tensor], batch: Batch) -> list[WrittenText]:
        """Return one prediction a row."""
        return written_texts(self._tokenizer, outputs, batch, self._generation)

    def metrics(self, predictions: Sequence[WrittenText]) -> dict[str, float]:
        """Return what `written_metrics` does; its texts are the answers."""
        return written_metrics(predictions)

    def report(self, predictions: Sequence[WrittenText]) -> dict[str, Any]:
        """Return nothing: there are no classes."""
        del predictions
        return {}

    def to_json(self, prediction: WrittenText) -> dict[str, Any]:
        """Return id; answer and the true one, where it was generated; loss and tokens if known.

        ``ended`` is false where the answer was cut at `max_new_tokens`.
        """
        from lora_cli.metrics.perplexity import perplexity

        line: dict[str, Any] = {"id": prediction.id}
        if prediction.text is not None:
            line |= {"answer": prediction.text, "ended": prediction.is_ended}
        if prediction.references:
            (line["reference"],) = prediction.references
        if (score := prediction.score) is not None and score.count:
            line["loss"] = score.loss_sum / score.count
            line["perplexity"] = perplexity(score.loss_sum, score.count)
            line["tokens"] = score.count
        return line

    def _inputs_of_lines(self, model: Callable[..., Any], batch: Batch) -> Inputs:
        """Return what gives some lines of a batch what the model reads besides tokens."""
        del model, batch
        return lambda _: {}

    def _inputs_of_prompts(self, model: Callable[..., Any], batch: Batch) -> Inputs:
        """Return what gives the prompts at some places what the model reads besides tokens."""
        del model, batch
        return lambda _: {}

    def _with_system(self, messages: list[Message]) -> list[Message]:
        """Put the system prompt of the settings before messages that have none."""
        system = self._config.system_prompt
        if system is not None and messages[0]["role"] != "system":
            return [{"role": "system", "content": system}, *messages]
        return messages

    def _whole(self, row: Row, ids: list[int], spans: list[tuple[int, int]]) -> Features:
        """Return the features of a conversation, as long as it may be."""
        most, overlong = self._config.max_length, self._config.overlong
        cut = max(0, len(ids) - most)
        features: Features = {"id": row.id, "cut": 0}
        if cut and overlong == "drop":
            features["left_out"] = True
        elif cut and overlong == "error":
            raise UserError(too_long(row, len(ids), most, what="conversation"))
        elif cut:
            features["cut"] = cut
            ids = ids[:most]
        kept = [[start, min(end, len(ids))] for start, end in spans if start < len(ids)]
        sequences = [{"input_ids": ids, "spans": kept}]
        learned = supervised(sequences)
        if cut and not learned:
            first = spans[0][0] if spans else len(ids)
            raise UserError(too_long(row, first, most, what="prompt"))
        return {**features, "length": len(ids), "sequences": sequences, "supervised": learned}

    def _question(self, row: Row, prompt: list[int], reference: str | None) -> Features:
        """Return the features of a conversation that is to be answered."""
        if len(prompt) > self._config.max_length and self._is_answering:
            raise UserError(too_long(row, len(prompt), self._config.max_length, what="prompt"))
        return {
            "id": row.id,
            "length": len(prompt),
            "cut": 0,
            "supervised": 0,
            "sequences": [],
            "prompt": prompt,
            "references": [] if reference is None else [reference],
        }


def last_answer(messages: Sequence[Message]) -> int:
    """Return the place of the last turn of the assistant."""
    return max(n for n, one in enumerate(messages) if one["role"] == "assistant")


class Chat(RowFamily):
    """The family's row in the table.

    Attributes:
        task: What the family binds.
        read: Gives the conversation of a row.
    """

    task: type[ChatTask] = ChatTask
    read: Callable[..., list[Message]] = staticmethod(read_messages)
    auto_class = "AutoModelForCausalLM"
    task_type: str | None = "CAUSAL_LM"
    inputs: tuple[Role, ...] = (
        Role("messages", ("messages", "conversations", "conversation"), optional=True),
        Role("prompt", ("prompt", "instruction", "question", "query", "user"), optional=True),
        Role("input", ("input",), optional=True),
        Role("system", ("system", "system_prompt"), optional=True),
        Role("documents", ("documents", "passages"), optional=True),
    )
    targets = (
        Role(
            "completion",
            ("completion", "output", "response", "answer", "chosen", "assistant"),
            optional=True,
        ),
    )

    def check_rows(self, rows: Sequence[Row], columns: Columns) -> list[Problem]:
        """Refuse rows that are no conversations, and without an answer unless it is wanted."""
        answering = columns["messages"] is None and columns["completion"] is None
        return check_messages(rows, columns, answering=answering, read=self.read)

    def check_row(self, row: Row, state: Mapping[str, Any]) -> None:
        """Refuse a row that cannot be answered."""
        raise_if(check_messages((row,), state["columns"], answering=True, read=self.read))

    def made_up_rows(self, config: Any, count: int) -> list[dict[str, Any]]:
        """Return conversations with the columns of the settings, for data out of reach."""
        return made_up_rows(config.data, count)

    def learn(
        self, config: Any, train: Sequence[Row], loaded: Loaded, columns: Columns
    ) -> dict[str, Any]:
        """Return ``chat_template``: the name of one, or what is in the file, or None.

        Raises:
            UserError: If the file cannot be read.
        """
        del train, loaded, columns
        source = config.chat_template
        if source is None or source in BUILT_IN:
            return {"chat_template": source}
        return {"chat_template": read_template(Path(source))}

    def describe(self, state: Mapping[str, Any]) -> str:
        """Return nothing."""
        del state
        return ""

    def model_options(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Return nothing: the head has an output for each token of the vocabulary."""
        del state
        return {}

    def arrange(
        self, config: Any, features: Sequence[Features], model: nn.Module
    ) -> tuple[list[Features], tuple[str, ...]]:
        """Put several conversations into a row, where that was asked for."""
        if not config.packing:
            return list(features), ()
        return training_lines(features, model, max_length=config.max_length)

    def bind_columns(
        self, columns: Sequence[str], state: Mapping[str, Any], *, where: str
    ) -> Mapping[str, Any]:
        """Find messages, or a prompt, among the columns of rows to answer.

        Where rows have both, the one that was trained on is read. A column `text` is taken for a
        prompt where there is none of the known names.
        """
        found = dict.fromkeys(state["columns"])
        known = state["columns"]
        is_prompted = known["messages"] is None and known["prompt"] in columns
        for role in self.inputs:
            more = ("text",) if role.name == "prompt" else ()
            names = (known[role.name], *role.known, *more)
            usual = (name for name in names if name in columns)
            found[role.name] = next(usual, None)
        if is_prompted:
            found["messages"] = None
        if found["messages"] is None and found["prompt"] is None:
            raise UserError(no_question(columns, where=where))
        return {**state, "columns": one_layout(found), "answering": True}

    def build(self, config: Any, state: Mapping[str, Any], processor: Any) -> ChatTask:
        """Bind the family; the tokenizer is a fast one.

        Raises:
            UserError: If it cannot tell where tokens are, there is no usable template, or answers
                are to be compared that are not asked for, or cannot be.
        """
        if config.metric not in NOT_GENERATED and not config.generate_in_eval:
            raise UserError(needs_answers(config.metric))
        if config.generate_in_eval:
            from lora_cli.metrics.generation import check_metric_packages

            check_metric_packages("task.generate_in_eval=true")
        return self.task(config, state, processor)

    def _resolve(self, data: Any, columns: Sequence[str]) -> tuple[Columns, list[str]]:
        found, notes = super()._resolve(data, columns)
        if found["messages"] is None and None in (found["prompt"], found["completion"]):
            raise UserError(no_layout(columns))
        # A prompt that the user names goes before messages that merely are there.
        by_prompt = data.prompt_column is not None and data.messages_column is None
        kept = one_layout({**found, "messages": None} if by_prompt else found)
        used = {name for name in kept.values() if name is not None}
        return kept, [note for note in notes if any(f"column {name} " in note for name in used)]

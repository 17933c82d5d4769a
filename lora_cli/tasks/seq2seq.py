"""Sequence to sequence: an encoder reads a text, a decoder writes another one.

The loss is cross-entropy, summed over the tokens of the targets, their ends included:
``loss_sum = -sum_n log softmax(logits_V at place n)[token n]``, ``count`` is their number. The
decoder reads the start token and the tokens before place n: the target is shifted once, here, and
the model is given no labels. Outside of training texts are written as well, where asked for.
Shapes: S tokens of a source, T tokens of a target, V entries of the vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from lora_cli.config.language import Seq2SeqConfig
from lora_cli.config.tasks import DataConfig
from lora_cli.data.columns import check_texts
from lora_cli.data.nested import flat_row, flat_rows
from lora_cli.data.references import check_references, row_references
from lora_cli.data.sources import Loaded
from lora_cli.data.types import Row
from lora_cli.errors import Problem, UserError
from lora_cli.tasks.contract import Batch, Features, StepOutput
from lora_cli.tasks.generation import generate, have_ended, unwrapped
from lora_cli.tasks.languages import set_languages
from lora_cli.tasks.output_head import loss_at, own_and_best_at
from lora_cli.tasks.rows import Columns, Role, RowFamily
from lora_cli.tasks.written import WrittenText, written_metrics, written_outputs, written_texts

SOURCES = ("source", "src", "article", "document", "dialogue", "input", "text", "sentence")
TARGETS = ("target", "tgt", "references", "summary", "highlights", "translation", "output")
# What the loss passes over: cross_entropy's own default.
IGNORED = -100


class Seq2SeqTask:
    """Sequence to sequence bound to a configuration, columns and a tokenizer."""

    couples_rows = False

    def __init__(self, config: Seq2SeqConfig, state: Mapping[str, Any], tokenizer: Any) -> None:
        self.metric: str = config.metric
        self.greater_is_better = config.metric != "loss"
        self._config = config
        self._columns: Columns = state["columns"]
        self._tokenizer = tokenizer
        self._options = set_languages(
            tokenizer,
            source_language=config.source_language,
            target_language=config.target_language,
        )

    def encode(self, row: Row) -> Features:
        """Tokenize source and target of a row.

        Returns:
            Besides what all features have, `source` and `target`, tokens, and `references`, texts;
            `target` is None and there are no `references` where the target is not known.
        """
        row = flat_row(row)
        text = self._config.prefix + row.values[self._columns["source"] or ""]
        source, cut = self._tokens(self._config.max_length, text=text)
        column = self._columns["target"]
        wanted = row_references(row, column) if column is not None else None
        target = None
        if wanted is not None:
            target, more = self._tokens(self._config.max_target_length, text_target=wanted[0])
            cut += more
        supervised = len(target or ())
        return {
            "id": row.id,
            "length": len(source) + supervised,
            "cut": cut,
            "supervised": supervised,
            "source": source,
            "target": target,
            "references": list(wanted or ()),
        }

    def collate(self, features: Sequence[Features]) -> Batch:
        """Stack sources (B, S), padded at their right, and targets.

        `labels` (B, T) are the tokens of the targets, -100 behind them, or None; `learned` says
        where they are tokens.
        """
        source = [{"input_ids": row["source"]} for row in features]
        inputs = self._tokenizer.pad(source, padding_side="right", return_tensors="pt")
        batch: Batch = {
            "ids": [row["id"] for row in features],
            "inputs": {name: inputs[name] for name in ("input_ids", "attention_mask")},
            "labels": None,
            "rows": list(features),
        }
        targets = [row["target"] for row in features]
        if all(target is not None for target in targets):
            width = max(map(len, targets))
            full = [[*target, *[IGNORED] * (width - len(target))] for target in targets]
            batch["labels"] = torch.tensor(full, dtype=torch.long)
            batch["learned"] = batch["labels"] != IGNORED
            batch["lines"] = [1] * len(targets)
        return batch

    def forward(self, model: Callable[..., Any], batch: Batch) -> StepOutput:
        """Return the loss of the targets' tokens; outside of training, write texts if asked to.

        The outputs, outside of training, are ``log_probs`` (B, T, 2), of each token of the target
        and of the best other one, where targets are known, and those of `written_outputs`.
        """
        labels_BT = batch["labels"]
        found = StepOutput(torch.zeros(()), 0, {})
        if labels_BT is not None:
            found = self.score_targets(model, batch)
        is_wanted = labels_BT is None or self._config.generate_in_eval
        if "seed" in batch or not is_wanted or not batch.get("generate", True):
            return found
        written = generate(
            model,
            self._tokenizer,
            [row["source"] for row in batch["rows"]],
            self._config.generation,
            ids=batch["ids"],
            options={"eos_token_id": self._ends(), **self._start(model), **self._options},
        )
        ended = have_ended(
            model, self._tokenizer, written, self._config.generation, end_ids=self._ends()
        )
        texts = written_outputs(written, ended, device=batch["inputs"]["input_ids"].device)
        return StepOutput(found.loss_sum, found.count, {**found.outputs, **texts})

    def decode(self, outputs: Mapping[str, torch.Tensor], batch: Batch) -> list[WrittenText]:
        """Return one prediction a row."""
        return written_texts(self._tokenizer, outputs, batch, self._config.generation)

    def metrics(self, predictions: Sequence[WrittenText]) -> dict[str, float]:
        """Return what `written_metrics` does."""
        return written_metrics(predictions, tokenizer=self._config.bleu_tokenizer)

    def report(self, predictions: Sequence[WrittenText]) -> dict[str, Any]:
        """Return nothing: there are no classes."""
        del predictions
        return {}

    def to_json(self, prediction: WrittenText) -> dict[str, Any]:
        """Return id; the text that was written, what was wanted, and the loss, where known.

        ``ended`` is false where the text was cut at `max_new_tokens`.
        """
        line: dict[str, Any] = {"id": prediction.id}
        if prediction.text is not None:
            line |= {"output": prediction.text, "ended": prediction.is_ended}
        if prediction.references:
            line["references"] = list(prediction.references)
        if (score := prediction.score) is not None and score.count:
            line["loss"] = score.loss_sum / score.count
        return line

    def score_targets(self, model: Callable[..., Any], batch: Batch) -> StepOutput:
        """Return the loss of `labels` given `inputs`, and what `forward` says of them."""
        labels_BT = batch["labels"]
        read_BT = shift_right(labels_BT, unwrapped(model), start=self._start(model))
        inputs = {**batch["inputs"], "decoder_input_ids": read_BT, "use_cache": False}
        return score_labels(model, inputs, labels_BT, batch)

    def _tokens(self, most: int, **text: str) -> tuple[list[int], int]:
        """Return the tokens of a text, and how many were cut off."""
        whole = list(self._tokenizer(**text)["input_ids"])
        if len(whole) <= most:
            return whole, 0
        kept = list(self._tokenizer(**text, truncation=True, max_length=most)["input_ids"])
        return kept, len(whole) - len(kept)

    def _start(self, model: Callable[..., Any]) -> dict[str, int]:
        """Return the first token that the decoder reads, as an option of generation."""
        if "decoder_start_token_id" in self._options:
            return {"decoder_start_token_id": self._options["decoder_start_token_id"]}
        config, tokenizer = unwrapped(model).config, self._tokenizer
        own = getattr(config, "decoder_start_token_id", None)
        # As a decoder of BERT's kind begins, whose folder may not say so.
        others = (tokenizer.bos_token_id, tokenizer.cls_token_id, tokenizer.pad_token_id)
        found = (token for token in (own, *others) if token is not None)
        return {"decoder_start_token_id": int(next(found))}

    def _ends(self) -> tuple[int, ...]:
        sep = self._tokenizer.sep_token_id
        return () if self._tokenizer.eos_token_id is not None or sep is None else (sep,)


def score_labels(
    model: Callable[..., Any], inputs: Mapping[str, Any], labels_BT: torch.Tensor, batch: Batch
) -> StepOutput:
    """Return the loss of labels, -100 behind them, and what `Seq2SeqTask.forward` says of them.

    Args:
        model: An encoder-decoder.
        inputs: Its keyword arguments, with as many tokens for the decoder as there are labels.
        labels_BT: Tokens.
        batch: Says whether this is a step of training, and its `label_smoothing`.
    """
    learned_BT = labels_BT != IGNORED
    true_N = labels_BT[learned_BT]
    if "seed" in batch:
        smoothing = batch.get("label_smoothing", 0.0)
        loss_sum = loss_at(model, inputs, learned_BT, true_N, label_smoothing=smoothing)
        return StepOutput(loss_sum, len(true_N), {})
    said_BT2 = torch.zeros((*labels_BT.shape, 2), device=labels_BT.device)
    said_BT2[learned_BT] = own_and_best_at(model, inputs, learned_BT, true_N).to(said_BT2)
    return StepOutput(-said_BT2[..., 0].sum(), len(true_N), {"log_probs": said_BT2})


def shift_right(labels_BT: torch.Tensor, model: Any, *, start: Mapping[str, int]) -> torch.Tensor:
    """Return what a decoder reads to predict each label: the start token and those before.

    Args:
        labels_BT: Tokens of the targets, -100 behind them.
        model: Says how it shifts them where it does so in a way of its own.
        start: The start token; see `Seq2SeqTask`.
    """
    # mBART moves the token of the language from the end to the start.
    if model.config.model_type == "mbart":
        read_BT: torch.Tensor = model.prepare_decoder_input_ids_from_labels(labels_BT)
        return read_BT
    padding = model.config.get_text_config(decoder=True).pad_token_id
    shifted_BT = labels_BT.new_full(labels_BT.shape, start["decoder_start_token_id"])
    shifted_BT[:, 1:] = labels_BT[:, :-1]
    return shifted_BT.masked_fill(shifted_BT == IGNORED, padding or 0)


class Seq2Seq(RowFamily):
    """The family's row in the table."""

    auto_class = "AutoModelForSeq2SeqLM"
    task_type: str | None = "SEQ_2_SEQ_LM"
    inputs = (Role("source", SOURCES),)
    targets = (Role("target", TARGETS),)

    def suit(
        self, data: DataConfig, loaded: Loaded, *, state: Mapping[str, Any] | None = None
    ) -> tuple[DataConfig, Loaded]:
        """Give what is within a column, such as a language, a column of its own."""
        del state
        return data, flat_rows(loaded)

    def check_rows(self, rows: Sequence[Row], columns: Columns) -> list[Problem]:
        """Refuse rows without a source, and without a target where it is read."""
        rows = [flat_row(row) for row in rows]
        problems = check_texts(rows, columns["source"] or "")
        if columns["target"] is None:
            return problems
        return problems + check_references(rows, columns["target"])

    def learn(
        self, config: Seq2SeqConfig, train: Sequence[Row], loaded: Loaded, columns: Columns
    ) -> dict[str, Any]:
        """Return nothing: the tokens are those of the tokenizer."""
        del config, train, loaded, columns
        return {}

    def describe(self, state: Mapping[str, Any]) -> str:
        """Return nothing."""
        del state
        return ""

    def model_options(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Return nothing: the head has an output for each token of the vocabulary."""
        del state
        return {}

    def bind_columns(
        self, columns: Sequence[str], state: Mapping[str, Any], *, where: str
    ) -> Mapping[str, Any]:
        """Find the source among the columns of rows to predict, also within another column."""
        source = state["columns"]["source"]
        outer = source.partition(".")[0]
        found = [source if name == outer else name for name in columns]
        return super().bind_columns(found, state, where=where)

    def build(self, config: Seq2SeqConfig, state: Mapping[str, Any], processor: Any) -> Seq2SeqTask:
        """Bind the family; `processor` is a tokenizer.

        Raises:
            UserError: If a language is unknown, or texts are to be compared that are not written,
                or cannot be compared.
        """
        if config.generate_in_eval:
            from lora_cli.metrics.generation import check_metric_packages

            check_metric_packages("task.generate_in_eval=true")
        elif config.metric != "loss":
            raise UserError(needs_texts(config.metric))
        return Seq2SeqTask(config, state, processor)


def needs_texts(metric: str) -> Problem:
    """Texts are to be compared that are not written."""
    return Problem(
        id="task.needs-texts",
        message=f"`task.metric` must be loss where no texts are written, but is {metric} and "
        "`task.generate_in_eval` is false.",
        key="task.metric",
        allowed="loss, or any with task.generate_in_eval=true",
        fix="task.metric=loss",
    )

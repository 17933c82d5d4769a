"""Masked language modelling: an encoder is trained further on plain text, such as that of a domain.

The head is the masked language modelling head of transformers. Some words are masked (see
`lora_cli.data.masking`), and the loss is cross-entropy, summed over the masked tokens of a batch:
``loss_sum = -sum_n log softmax(logits_V at token n)[true token n]``, ``count`` is their number.

A text becomes one or more windows of at most `max_length` tokens. What is masked in it depends on
its row id and, in training, on `batch["seed"]`; else it is always the same, so that models can be
compared. Shapes: W windows of all rows of a batch, T tokens, V entries of the vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lora_cli.config.tasks import MaskedLanguageModelingConfig
from lora_cli.data.columns import TEXT_COLUMNS, check_texts
from lora_cli.data.files import ALL_LAYOUTS
from lora_cli.data.masking import NEVER, Masked, MaskRule, cut_windows, draw_masks, number_units
from lora_cli.data.sources import Loaded
from lora_cli.data.types import Row
from lora_cli.errors import Problem, UserError
from lora_cli.tasks.contract import Batch, Features, StepOutput
from lora_cli.tasks.output_head import logits_at, loss_at, own_and_best_at
from lora_cli.tasks.rows import Columns, Role, RowFamily, without_blank
from lora_cli.tasks.token_loss import own_and_best
from lora_cli.tasks.windows import trim

_BEST = 5


@dataclass(frozen=True, slots=True)
class Guess:
    """What a model expects where a text has a mask token.

    Attributes:
        start: Where the mask token begins, in characters of the text.
        end: Where it ends, not included.
        tokens: The most probable tokens with their probabilities, best first.
    """

    start: int
    end: int
    tokens: tuple[tuple[str, float], ...]


@dataclass(frozen=True, slots=True)
class MaskedPrediction:
    """What a model says about one text.

    Attributes:
        id: Row id.
        text: The text.
        loss_sum: Sum of -log of the probabilities of the tokens that were masked here.
        hits: How many of these the model predicts.
        count: How many there are; 0 for a text that has mask tokens itself.
        guesses: One for each mask token of the text.
    """

    id: str
    text: str
    loss_sum: float
    hits: int
    count: int
    guesses: tuple[Guess, ...]


class MaskedLanguageModelingTask:
    """Masked language modelling bound to a configuration, a column and a tokenizer."""

    couples_rows = False

    def __init__(
        self, config: MaskedLanguageModelingConfig, state: Mapping[str, Any], tokenizer: Any
    ) -> None:
        _check_tokenizer(tokenizer)
        self.metric: str = config.metric
        self.greater_is_better = config.metric != "perplexity"
        self._column: str = state["columns"]["text"]
        self._whole_words = config.whole_words
        self._size = config.max_length - tokenizer.num_special_tokens_to_add(pair=False)
        self._tokenizer = tokenizer
        self._special = frozenset(tokenizer.all_special_ids)
        self._rule = MaskRule(
            share=config.mask_probability,
            mask=tokenizer.mask_token_id,
            others=[number for number in range(len(tokenizer)) if number not in self._special],
        )

    def encode(self, row: Row) -> Features:
        """Tokenize a text and cut it into windows.

        Returns:
            ``windows``, what the tokenizer returns for each; ``units`` of their tokens;
            ``asked``, window, place and span in the text of each mask token; ``length``, the
            tokens of all windows; ``supervised``, the tokens that may be masked.
        """
        text = row.values[self._column]
        whole = self._tokenizer(text, return_offsets_mapping=True)
        spans, owners, words = whole.pop("offset_mapping"), whole.sequence_ids(), whole.word_ids()
        told = [place for place, owner in enumerate(owners) if owner is not None]
        first, end = (told[0], told[-1] + 1) if told else (len(owners), len(owners))
        ids = whole["input_ids"]
        units = number_units(
            words[first:end],
            [number not in self._special for number in ids[first:end]],
            whole_words=self._whole_words,
        )
        windows, own_units, asked = [], [], []
        for number, (start, stop) in enumerate(cut_windows(units, size=self._size)):
            kept = range(first + start, first + stop)
            windows.append(
                {
                    name: [*values[:first], *(values[place] for place in kept), *values[end:]]
                    for name, values in whole.items()
                }
            )
            around = [NEVER] * first, [NEVER] * (len(ids) - end)
            own_units.append([*around[0], *units[start:stop], *around[1]])
            for place in kept:
                if ids[place] == self._rule.mask:
                    asked.append([number, place - start, *trim(text, *spans[place])])
        return {
            "id": row.id,
            "windows": windows,
            "units": own_units,
            "asked": asked,
            "text": text,
            "length": sum(map(len, own_units)),
            "cut": 0,
            "supervised": sum(unit != NEVER for unit in units),
        }

    def collate(self, features: Sequence[Features]) -> Batch:
        """Pad the windows of all rows to the longest: `inputs` of shape (W, T), row after row."""
        windows = [window for row in features for window in row["windows"]]
        padded = self._tokenizer.pad(windows, padding_side="right", return_tensors="pt")
        return {
            "ids": [row["id"] for row in features],
            "inputs": dict(padded),
            "rows": list(features),
        }

    def forward(self, model: Callable[..., Any], batch: Batch) -> StepOutput:
        """Return the loss of the masked tokens, their number, and what was said about them.

        The outputs, outside of training, are ``log_probs`` (W, T, 2), of the true token and of the
        best other one, 0 where nothing was masked; and ``asked`` (W, K, V), scores for the mask
        tokens that the texts have themselves, where there are some: K is their largest number in a
        window.
        """
        ids_WT = batch["inputs"]["input_ids"]
        windows, places, shown = self._masks(batch)
        changed_WT = ids_WT.index_put((windows, places), shown)
        inputs = {**batch["inputs"], "input_ids": changed_WT}
        masked_WT = torch.zeros_like(ids_WT, dtype=torch.bool)
        masked_WT[windows, places] = True
        true_N = ids_WT[masked_WT]
        if "seed" in batch:
            return StepOutput(loss_at(model, inputs, masked_WT, true_N), len(true_N), {})
        said_WT2 = torch.zeros((*ids_WT.shape, 2), device=ids_WT.device)
        outputs = {"log_probs": said_WT2}
        asked_WK = _asked_places(batch["rows"]).to(ids_WT.device)
        if not asked_WK.numel():
            said_N2 = own_and_best_at(model, inputs, masked_WT, true_N)
        else:
            rows_W1 = torch.arange(len(asked_WK), device=ids_WT.device).unsqueeze(1)
            read_WT = masked_WT.clone()
            read_WT[rows_W1, asked_WK] = True
            logits_NV = logits_at(model, inputs, read_WT)
            said_N2 = own_and_best(logits_NV[masked_WT[read_WT]], true_N.to(logits_NV.device))
            order_WT = (read_WT.reshape(-1).cumsum(0) - 1).view_as(read_WT)
            outputs["asked"] = logits_NV[order_WT[rows_W1, asked_WK]].float()
        said_WT2[masked_WT] = said_N2.to(said_WT2)
        return StepOutput(-said_WT2[..., 0].sum(), len(true_N), outputs)

    def decode(self, outputs: Mapping[str, torch.Tensor], batch: Batch) -> list[MaskedPrediction]:
        """Put the windows of each row together; only for what was not run in training."""
        said_WT2, predictions, before = outputs["log_probs"].cpu(), [], 0
        for row in batch["rows"]:
            masked = self._masks_of(row, number=None)
            own = said_WT2[before : before + len(row["windows"])]
            said_N2 = own[[one.window for one in masked], [one.place for one in masked]].double()
            guesses, counts = [], [0] * len(row["windows"])
            for window, _, start, end in row["asked"]:
                scores_V = outputs["asked"][before + window, counts[window]]
                counts[window] += 1
                guesses.append(Guess(start, end, self._best(scores_V)))
            predictions.append(
                MaskedPrediction(
                    id=row["id"],
                    text=row["text"],
                    loss_sum=float(-said_N2[:, 0].sum()),
                    hits=int((said_N2[:, 0] > said_N2[:, 1]).sum()),
                    count=len(masked),
                    guesses=tuple(guesses),
                )
            )
            before += len(row["windows"])
        return predictions

    def metrics(self, predictions: Sequence[MaskedPrediction]) -> dict[str, float]:
        """Return perplexity and accuracy over the masked tokens of all rows."""
        from lora_cli.metrics.perplexity import masked_metrics

        return masked_metrics(
            [one.loss_sum for one in predictions],
            [one.hits for one in predictions],
            [one.count for one in predictions],
        )

    def report(self, predictions: Sequence[MaskedPrediction]) -> dict[str, Any]:
        """Return nothing: there are no classes."""
        del predictions
        return {}

    def to_json(self, prediction: MaskedPrediction) -> dict[str, Any]:
        """Return id and text, and the best tokens for each of its mask tokens.

        For a text without any, the loss and the perplexity of tokens that were masked to find out,
        and their number; both are null if there are none that could be.
        """
        from lora_cli.metrics.perplexity import perplexity

        line: dict[str, Any] = {"id": prediction.id, "text": prediction.text}
        if prediction.guesses:
            line["masks"] = [
                {
                    "start": guess.start,
                    "end": guess.end,
                    "tokens": [{"token": token, "probability": p} for token, p in guess.tokens],
                }
                for guess in prediction.guesses
            ]
            return line
        count, loss_sum = prediction.count, prediction.loss_sum
        line["loss"] = loss_sum / count if count else None
        line["perplexity"] = perplexity(loss_sum, count) if count else None
        return {**line, "masked_tokens": count}

    def _best(self, scores_V: torch.Tensor) -> tuple[tuple[str, float], ...]:
        values, numbers = scores_V.softmax(dim=-1).topk(min(_BEST, len(scores_V)))
        texts = [self._tokenizer.decode([number]).strip() for number in numbers.tolist()]
        return tuple(zip(texts, values.tolist(), strict=True))

    def _masks_of(self, row: Features, *, number: int | None) -> list[Masked]:
        # A text that asks for tokens is left as it is, but for training.
        if row["asked"] and number is None:
            return []
        ids = [window["input_ids"] for window in row["windows"]]
        key = f"{0 if number is None else number}/{row['id']}"
        return draw_masks(ids, row["units"], rule=self._rule, key=key)

    def _masks(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return window, place and shown token of all masked tokens of a batch, each (N,)."""
        found, before = [], 0
        for row in batch["rows"]:
            masked = self._masks_of(row, number=batch.get("seed"))
            found += [(before + one.window, one.place, one.shown) for one in masked]
            before += len(row["windows"])
        device = batch["inputs"]["input_ids"].device
        windows, places, shown = torch.tensor(found, device=device).long().view(-1, 3).unbind(1)
        return windows, places, shown


class MaskedLanguageModeling(RowFamily):
    """The family's row in the table."""

    auto_class = "AutoModelForMaskedLM"
    # PEFT has no wrapper for it.
    task_type: str | None = None
    inputs = (Role("text", TEXT_COLUMNS),)
    targets: tuple[Role, ...] = ()
    layouts = ALL_LAYOUTS

    def check_rows(self, rows: Sequence[Row], columns: Columns) -> list[Problem]:
        """Refuse rows without text."""
        return check_texts(rows, columns["text"] or "")

    def learn(
        self,
        config: MaskedLanguageModelingConfig,
        train: Sequence[Row],
        loaded: Loaded,
        columns: Columns,
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

    def _with_targets(
        self, loaded: Loaded, columns: Columns
    ) -> tuple[dict[str, tuple[Row, ...]], list[str]]:
        """Leave out blank texts, which files of running text have between paragraphs."""
        return without_blank(loaded, columns["text"] or "")

    def build(
        self, config: MaskedLanguageModelingConfig, state: Mapping[str, Any], processor: Any
    ) -> MaskedLanguageModelingTask:
        """Bind the family; `processor` is a tokenizer that has a mask token."""
        return MaskedLanguageModelingTask(config, state, processor)


def _asked_places(rows: Sequence[Features]) -> torch.Tensor:
    """Return the places of the mask tokens in each window, (W, K), filled up with 0."""
    places: list[list[int]] = []
    for row in rows:
        own: list[list[int]] = [[] for _ in row["windows"]]
        for window, place, _, _ in row["asked"]:
            own[window].append(place)
        places += own
    most = max(map(len, places), default=0)
    return torch.tensor([own + [0] * (most - len(own)) for own in places], dtype=torch.long)


def _check_tokenizer(tokenizer: Any) -> None:
    problems = []
    if not getattr(tokenizer, "is_fast", False):
        problems.append(
            Problem(
                id="task.slow-tokenizer",
                message="The tokenizer must tell which word each token is of, but "
                f"{type(tokenizer).__name__} does not.",
                fix="use a model that has a tokenizer.json",
            )
        )
    if getattr(tokenizer, "mask_token_id", None) is None:
        problems.append(
            Problem(
                id="task.no-mask-token",
                message="The tokenizer must have a mask token, but "
                f"{type(tokenizer).__name__} of this model has none.",
                key="model.path",
                fix="use an encoder that was trained with masked tokens, such as model=bert",
            )
        )
    if problems:
        raise UserError(problems)

"""Speech recognition, and translation into English, by a decoder that writes texts (Whisper).

The decoder is given tokens for the language, for what to do and for no moments, and writes the
transcript as it is in the data. The loss is cross-entropy, summed over the tokens of the
transcripts, their ends included; the given tokens are not learned (arXiv:2212.04356, section 2.3).
Shapes: B rows, M bands of a spectrum, F of its frames, P given tokens, T tokens of a transcript, V
entries of the vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutput

from lora_cli.config.audio import SpeechRecognitionSeq2SeqConfig
from lora_cli.data.sources import Loaded
from lora_cli.data.transcripts import normalize
from lora_cli.data.types import Row
from lora_cli.errors import Problem, UserError
from lora_cli.models.sound_windows import WHISPER_POSITIONS, cut_model, cut_processor
from lora_cli.models.spoken_languages import prompt_tokens, set_spoken_language, space_before
from lora_cli.models.time_masks import seeded_masks
from lora_cli.tasks.contract import Batch, Features, StepOutput
from lora_cli.tasks.generation import have_ended, unwrapped
from lora_cli.tasks.rows import Columns
from lora_cli.tasks.seq2seq import IGNORED, needs_texts, score_labels
from lora_cli.tasks.speech_windows import WindowReader, join_windows
from lora_cli.tasks.spoken import SpokenFamily, without_long
from lora_cli.tasks.transcribing import transcribe
from lora_cli.tasks.written import (
    WrittenText,
    compared_texts,
    score_metrics,
    share_ended,
    written_outputs,
    written_texts,
)

# Windows of long sounds that are read together, at most.
_TOGETHER = 8


class SpeechRecognitionSeq2SeqTask:
    """Speech recognition bound to a configuration, a tokenizer and a reader."""

    couples_rows = False

    def __init__(
        self,
        config: SpeechRecognitionSeq2SeqConfig,
        state: Mapping[str, Any],
        tokenizer: Any,
        reader: WindowReader,
    ) -> None:
        self.metric: str = config.metric
        self.greater_is_better = False
        self._config, self._tokenizer, self._reader = config, tokenizer, reader
        self._column: str | None = state["columns"]["text"]
        self._prompt = prompt_tokens(tokenizer)
        self._space = space_before(tokenizer)

    def encode(self, row: Row) -> Features:
        """Open the sound of a row and tokenize its transcript.

        Returns:
            Besides what all features have, `fits`, whether one window holds the sound; `target`,
            the tokens of the transcript, or None where it is not known or too long to be learned;
            and `references`, a text where it is known.
        """
        found = self._reader.encode(row)
        if self._column is None:
            return {**found, "target": None, "references": [], "supervised": 0}
        text = row.values[self._column].strip()
        tokens = self._tokenizer(self._space + text, add_special_tokens=False)["input_ids"]
        target = [*tokens, self._tokenizer.eos_token_id]
        is_short = len(self._prompt) + len(target) <= self._config.max_target_length
        return {
            **found,
            "target": target if is_short else None,
            "references": [text],
            "supervised": len(target) if is_short else 0,
        }

    def collate(self, features: Sequence[Features]) -> Batch:
        """Put rows together.

        `labels` (B, T) are the tokens of the transcripts, -100 behind them and for rows without;
        `learned` says where they are tokens of a sound in one window.
        """
        targets = [row["target"] or [] for row in features]
        width = max(map(len, targets))
        full = [[*target, *[IGNORED] * (width - len(target))] for target in targets]
        labels_BT = torch.tensor(full, dtype=torch.long).view(len(features), width)
        fits_B = torch.tensor([row["fits"] for row in features])
        return {
            "ids": [row["id"] for row in features],
            **self._reader.collate(features),
            "fits": fits_B.tolist(),
            "labels": labels_BT,
            "learned": (labels_BT != IGNORED) & fits_B[:, None],
            "lines": [1] * len(features),
            "rows": list(features),
        }

    def forward(self, model: Callable[..., Any], batch: Batch) -> StepOutput:
        """Return the loss of the transcripts' tokens; outside of training, write texts if asked to.

        The outputs, outside of training, are ``log_probs`` (B, T, 2), as of
        `lora_cli.tasks.seq2seq`, and those of `lora_cli.tasks.written.written_outputs`. Of sounds
        longer than a window there are texts only; where two forms of a model are compared, their
        first window is run.
        """
        compares, is_known = not batch.get("generate", True), bool(batch["labels"].shape[1])
        rows = [row for row, fits in enumerate(batch["fits"]) if fits or compares]
        inputs: Mapping[str, Any] = {}
        if rows:
            inputs = self._reader.first_windows(batch, rows, model)
        found = StepOutput(torch.zeros(()), 0, {})
        if is_known:
            found, inputs = self._score(model, batch, rows, inputs)
        if "seed" in batch or compares or not (self._config.generate_in_eval or not is_known):
            return found
        texts: dict[int, tuple[list[int], bool]] = {}
        if rows:
            ids = [batch["ids"][row] for row in rows]
            texts = dict(zip(rows, self._write(model, inputs, ids), strict=True))
        for row, row_id in enumerate(batch["ids"]):
            if row not in texts:
                texts[row] = self._write_long(model, batch["places"][row], row_id)
        written, ended = zip(*(texts[row] for row in sorted(texts)), strict=True)
        more = written_outputs(written, ended, device=batch["labels"].device)
        return StepOutput(found.loss_sum, found.count, {**found.outputs, **more})

    def decode(self, outputs: Mapping[str, torch.Tensor], batch: Batch) -> list[WrittenText]:
        """Return one prediction a row."""
        return written_texts(self._tokenizer, outputs, batch, self._config.generation)

    def metrics(self, predictions: Sequence[WrittenText]) -> dict[str, float]:
        """Return wer and cer of normalized texts, the share that ended, and how tokens are told."""
        from lora_cli.metrics.speech import speech_metrics

        found, pairs = score_metrics(predictions), compared_texts(predictions)
        if not pairs:
            return found
        texts = [self._normal(text) for text, _ in pairs]
        errors = speech_metrics(texts, [self._normal(wanted[0]) for _, wanted in pairs])
        return {**errors, **found, "ended": share_ended(predictions)}

    def report(self, predictions: Sequence[WrittenText]) -> dict[str, Any]:
        """Return nothing: the metrics say it all."""
        del predictions
        return {}

    def to_json(self, prediction: WrittenText) -> dict[str, Any]:
        """Return id and text; the transcript, both as they are scored, and the loss, where known.

        ``ended`` is false where the text was cut at `max_new_tokens`.
        """
        line: dict[str, Any] = {"id": prediction.id}
        if prediction.text is not None:
            line |= {"text": prediction.text, "ended": prediction.is_ended}
        if prediction.references:
            line["reference"] = prediction.references[0]
            if prediction.text is not None:
                line["scored"] = {name: self._normal(line[name]) for name in ("text", "reference")}
        if (score := prediction.score) is not None and score.count:
            line["loss"] = score.loss_sum / score.count
        return line

    def _normal(self, text: str) -> str:
        return normalize(text, self._config.normalizer)

    def _score(
        self,
        model: Callable[..., Any],
        batch: Batch,
        rows: Sequence[int],
        inputs: Mapping[str, torch.Tensor],
    ) -> tuple[StepOutput, Mapping[str, Any]]:
        """Return the loss of some rows, and what the encoder made of them in place of inputs."""
        labels_BT = batch["labels"]
        said_BT2 = torch.zeros((*labels_BT.shape, 2), device=labels_BT.device)
        if not rows:
            return StepOutput(torch.zeros(()), 0, {"log_probs": said_BT2}), inputs
        labels_ST = labels_BT[list(rows)]
        prompt_SP = labels_ST.new_tensor([self._prompt] * len(rows))
        # What stands behind a transcript is seen by none of its tokens.
        before_ST = labels_ST[:, :-1].masked_fill(labels_ST[:, :-1] == IGNORED, 0)
        read_SR = torch.cat([prompt_SP, before_ST], dim=1)
        with seeded_masks(model, seed=batch.get("seed"), ids=batch["ids"], samples=0):
            said = model(**inputs, decoder_input_ids=read_SR, use_cache=False)
        spoken = SimpleNamespace(logits=said.logits[:, len(self._prompt) - 1 :])
        found = score_labels(lambda: spoken, {}, labels_ST, batch)
        states = BaseModelOutput(last_hidden_state=said.encoder_last_hidden_state)
        if "seed" in batch:
            return found, {"encoder_outputs": states}
        said_BT2[list(rows)] = found.outputs["log_probs"].to(said_BT2)
        scored = StepOutput(found.loss_sum, found.count, {"log_probs": said_BT2})
        return scored, {"encoder_outputs": states}

    def _write(
        self, model: Callable[..., Any], inputs: Mapping[str, Any], ids: Sequence[str]
    ) -> list[tuple[list[int], bool]]:
        """Return the tokens of each text, and whether it ended by itself."""
        how = self._config.generation
        written = transcribe(model, self._tokenizer, inputs, how, ids=ids, prompt=self._prompt)
        ended = have_ended(model, self._tokenizer, written, how)
        return list(zip(written, ended, strict=True))

    def _write_long(
        self, model: Callable[..., Any], place: Mapping[str, Any], row_id: str
    ) -> tuple[list[int], bool]:
        """Return the same of a sound that is longer than a window."""
        found: list[tuple[list[int], bool]] = []
        spans, parts = self._reader.windows(place, model, most=_TOGETHER)
        for inputs in parts:
            count = len(next(iter(inputs.values())))
            ids = [f"{row_id}/{len(found) + number}" for number in range(count)]
            found += self._write(model, inputs, ids)
        special = set(self._tokenizer.all_special_ids)
        texts = [[token for token in text if token not in special] for text, _ in found]
        return join_windows(texts, spans), all(has_ended for _, has_ended in found)


class SpeechRecognitionSeq2Seq(SpokenFamily):
    """A row in the table of families; the state holds ``language``, ``translate``, ``seconds``."""

    auto_class = "AutoModelForSpeechSeq2Seq"
    processor = "speech processor"

    def learn(
        self,
        config: SpeechRecognitionSeq2SeqConfig,
        train: Sequence[Row],
        loaded: Loaded,
        columns: Columns,
    ) -> dict[str, Any]:
        """Return what the settings say of tokenizer and model."""
        del train, loaded, columns
        return {
            "language": config.language,
            "translate": config.translate,
            "seconds": config.max_seconds,
        }

    def describe(self, state: Mapping[str, Any]) -> str:
        """Return nothing."""
        del state
        return ""

    def arrange(
        self, config: Any, features: Sequence[Features], model: nn.Module
    ) -> tuple[Sequence[Features], tuple[str, ...]]:
        """Leave out what is too long to be trained on: a sound, or its transcript."""
        window = unwrapped(model).config.max_source_positions / WHISPER_POSITIONS
        fitting = [row for row in features if row["fits"]]
        found, notes = without_long(
            features,
            fitting,
            limit=f"the window of {window:g} s",
            key="task.max_seconds",
            fix="cut the recordings at pauses",
        )
        limit = f"task.max_target_length={config.max_target_length}"
        found, more = without_long(
            found,
            [row for row in found if row["target"] is not None],
            limit=limit,
            key="task.max_target_length",
            fix="cut the recordings at pauses, or raise it",
        )
        return found, notes + more

    def model_options(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Return nothing: the head has an output for each token of the vocabulary."""
        del state
        return {}

    def fit_model(self, model: nn.Module, state: Mapping[str, Any]) -> None:
        """Cut the window, where that was asked for.

        Raises:
            UserError: If the model is none of Whisper's kind.
        """
        kind: Any = model.config
        if kind.model_type != "whisper":
            raise UserError(_no_whisper(kind.model_type))
        if state["seconds"] is not None:
            cut_model(model, state["seconds"])

    def fit_processor(self, processor: Any, state: Mapping[str, Any]) -> Any:
        """Tell the tokenizer what is spoken, and the feature extractor its window.

        Raises:
            UserError: If the tokenizer does not know the language.
        """
        set_spoken_language(processor.tokenizer, state["language"], translates=state["translate"])
        if state["seconds"] is not None:
            cut_processor(processor.feature_extractor, state["seconds"])
        return processor

    def build(
        self, config: SpeechRecognitionSeq2SeqConfig, state: Mapping[str, Any], processor: Any
    ) -> SpeechRecognitionSeq2SeqTask:
        """Bind the family; `processor` is one with a feature extractor and a tokenizer.

        Raises:
            UserError: If texts are to be compared that are not written.
        """
        if not config.generate_in_eval and config.metric != "loss":
            raise UserError(needs_texts(config.metric))
        reader = WindowReader(processor.feature_extractor, state, augmentation=config.augmentation)
        return SpeechRecognitionSeq2SeqTask(config, state, processor.tokenizer, reader)


def _no_whisper(architecture: str) -> Problem:
    return Problem(
        id="model.wrong-architecture",
        message="`model.path` must name a model of Whisper's architecture, whose decoder is told "
        f"a language and writes, but {architecture} is another.",
        key="model.path",
        allowed="whisper",
        fix="model=whisper-base; wav2vec 2.0, HuBERT and WavLM go with task=speech_recognition_ctc",
    )

"""Images with captions, or with labels that are told by a text, as inputs of a row."""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from lora_cli.config.media import PROMPT, ImageTextContrastiveConfig
from lora_cli.config.tasks import DataConfig
from lora_cli.data import made_up
from lora_cli.data.columns import list_columns
from lora_cli.data.sources import Loaded
from lora_cli.data.types import Row
from lora_cli.errors import Problem
from lora_cli.models.processors import is_sigmoid
from lora_cli.tasks.contract import Batch, Features
from lora_cli.tasks.images import ImageReader
from lora_cli.tasks.media import like_model
from lora_cli.tasks.rows import Columns, Role

CAPTION = Role(
    "caption",
    ("caption", "captions", "text", "sentence", "description", "title"),
    optional=True,
    made_up=made_up.text,
)
# It has no usual names: most rows with labels are not there to be classified.
LABEL = Role("label", optional=True, made_up=made_up.candidate)


class PairReader(ImageReader):
    """Reads images, captions, and the prompts of labels, which come after the captions.

    Args:
        processor: Of the model.
        columns: Of the rows, by role.
        config: Of the task.
    """

    def __init__(
        self, processor: Any, columns: Columns, *, config: ImageTextContrastiveConfig
    ) -> None:
        super().__init__(processor.image_processor, columns, augmentation=config.augmentation)
        self._tokenizer, self._max_length = processor.tokenizer, config.max_length
        self._has_one_length = is_sigmoid(processor)
        self._caption = columns["caption"]
        prompt = config.zero_shot.prompt or PROMPT
        labels = config.zero_shot.labels or ()
        self._prompts = [self._tokens(prompt.replace("{}", label))[0] for label in labels]

    def describe(self, content: bytes) -> Features:
        """Return what `ImageReader.describe` does, and what tells the image from others."""
        return {**super().describe(content), "image": hashlib.sha256(content).hexdigest()}

    def encode(self, row: Row) -> Features:
        """Encode a row; `caption` is None where there is none."""
        found = super().encode(row)
        if self._caption is None:
            return {**found, "caption": None, "tokens": {}}
        text = row.values[self._caption]
        ids, cut = self._tokens(text)
        return {
            **found,
            "caption": text,
            "tokens": {"input_ids": ids},
            "cut": cut,
            "measures": {**found["measures"], "tokens": len(ids)},
        }

    def collate(self, features: Sequence[Features]) -> Batch:
        """Put places, `images`, `captions` (or None) and their tokens together."""
        captions = [row["caption"] for row in features]
        return {
            **super().collate(features),
            "images": [row["image"] for row in features],
            "captions": None if None in captions else captions,
            "tokens": [row["tokens"]["input_ids"] for row in features if row["tokens"]],
        }

    def inputs(self, batch: Batch, model: Callable[..., Any]) -> Mapping[str, torch.Tensor]:
        """Return the inputs of a model; outside of training with those of the prompts."""
        is_training = "seed" in batch
        texts = self._tokenizer.pad(
            {"input_ids": [*batch["tokens"], *(() if is_training else self._prompts)]},
            padding="max_length" if self._has_one_length else True,
            max_length=self._max_length if self._has_one_length else None,
            return_tensors="pt",
        )
        images = self.process(batch["places"], batch["ids"], seed=batch.get("seed"))
        return like_model({**texts, **images}, model)

    def _tokens(self, text: str) -> tuple[list[int], int]:
        """Return the tokens of a text, and the number of those that were cut off."""
        whole: list[int] = self._tokenizer(text)["input_ids"]
        if len(whole) <= self._max_length:
            return whole, 0
        # The last one stays, from which CLIP takes the meaning of the text.
        kept = self._tokenizer(text, truncation=True, max_length=self._max_length)["input_ids"]
        return kept, len(whole) - len(kept)


def by_caption(data: DataConfig, loaded: Loaded) -> Loaded:
    """Return a row for each caption where an image has a list of them."""
    columns = list_columns([row for rows in loaded.rows.values() for row in rows])
    wanted = CAPTION.known if data.caption_column is None else (data.caption_column,)
    by_folded = {name.casefold(): name for name in columns} | {name: name for name in columns}
    column = next((by_folded[name] for name in wanted if name in by_folded), None)
    if column is None:
        return loaded
    rows = {
        split: tuple(one for row in found for one in _by_caption(row, column))
        for split, found in loaded.rows.items()
    }
    return replace(loaded, rows=rows)


def _by_caption(row: Row, column: str) -> Iterable[Row]:
    """Yield a row for each caption of a list; an empty list is a missing caption."""
    captions = row.values.get(column)
    if not isinstance(captions, list):
        yield row
        return
    for number, text in enumerate(captions or [None], start=1):
        yield replace(row, id=f"{row.id}#{number}", values={**row.values, column: text})


def image_key(place: Mapping[str, Any]) -> str:
    """Return a text that is the same for rows with the image of one file or cell."""
    return str([place.get(name) for name in ("file", "table", "column", "row")])


def without_purpose(columns: Columns) -> list[Problem]:
    """Return what is wrong with rows that are not to be classified."""
    if columns["label"] is not None:
        return [
            Problem(
                id="data.no-zero-shot",
                message="`task.data.label_column` must come with the labels that images are to be "
                "given, but `zero_shot.labels` is not set.",
                key="task.data.label_column",
                fix="zero_shot.labels=[cat,dog] (in training task.zero_shot.labels=[cat,dog])",
            )
        ]
    if columns["caption"] is None:
        return [
            Problem(
                id="data.nothing-to-compare",
                message="Rows must have a caption, or there must be labels to choose from, but "
                "neither is there.",
                key="zero_shot.labels",
                allowed=f"a column called {', '.join(CAPTION.known)}",
                fix="zero_shot.labels=[cat,dog], or add the column with the captions",
            )
        ]
    return []

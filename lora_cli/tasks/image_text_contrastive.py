"""Images and captions by contrast: a dual encoder learns which of them belong together.

For the B pairs of a batch, with unit vectors x of images and y of captions, the model says
``z_ij = exp(s) x_i . y_j + b``. Of CLIP (Radford et al. 2021, arXiv:2103.00020), where b is 0, the
loss is that of finding the caption of an image and the image of a caption::

    loss_sum = -1/2 sum_i (log softmax_j z_ij + log softmax_j z_ji)  at j = i

and of SigLIP (Zhai et al. 2023, arXiv:2303.15343) that of telling each pair by itself, where t is 1
for pairs that belong together and -1 for others::

    loss_sum = -sum_ij log sigmoid(t_ij z_ij)

``count`` is B for both, so that the mean is what transformers computes. Either compares the rows
of a batch with each other: `couples_rows`.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from lora_cli.config.media import ImageTextContrastiveConfig
from lora_cli.config.tasks import DataConfig
from lora_cli.data.columns import (
    canonical_label,
    check_labels,
    check_texts,
    label_indices,
    list_columns,
    resolve_column,
)
from lora_cli.data.groups import Groups
from lora_cli.data.listing import list_rows
from lora_cli.data.sources import Loaded
from lora_cli.data.types import Row
from lora_cli.errors import Problem, UserError
from lora_cli.models.processors import is_sigmoid
from lora_cli.tasks.captions import (
    CAPTION,
    LABEL,
    PairReader,
    by_caption,
    image_key,
    without_purpose,
)
from lora_cli.tasks.contract import Batch, Features, StepOutput
from lora_cli.tasks.images import IMAGE, ImageFamily
from lora_cli.tasks.rows import Columns, raise_if

# Of the models that compare images with texts those that were trained with one of these losses.
MODELS = ("clip", "siglip", "siglip2", "chinese_clip", "metaclip_2")


@dataclass(frozen=True, slots=True)
class PairPrediction:
    """What a model makes of one row.

    Attributes:
        id: Row id.
        image: What tells its image from others.
        image_vector: Unit vector of the image.
        caption: Its caption, or None where there is none.
        text_vector: Unit vector of the caption.
        scores: Of each label of zero-shot classification, probabilities; empty without labels.
        reference: Number of the true label, or None where it is not known.
    """

    id: str
    image: str
    image_vector: NDArray[np.float32]
    caption: str | None
    text_vector: NDArray[np.float32] | None
    scores: tuple[float, ...]
    reference: int | None

    @property
    def label(self) -> int:
        """The label with the highest score."""
        return max(range(len(self.scores)), key=self.scores.__getitem__)


class ImageTextContrastiveTask:
    """Contrastive tuning bound to a configuration, columns and a processor."""

    greater_is_better = True
    couples_rows = True

    def __init__(
        self, config: ImageTextContrastiveConfig, state: Mapping[str, Any], processor: Any
    ) -> None:
        self.metric: str = config.metric
        self._label_column: str | None = state["columns"]["label"]
        self._labels = config.zero_shot.labels or ()
        self._indices = label_indices(self._labels, numbered=True)
        self._is_sigmoid = is_sigmoid(processor)
        self._reader = PairReader(processor, state["columns"], config=config)

    def encode(self, row: Row) -> Features:
        """Encode a row; `label` is None where it is not known."""
        column = self._label_column
        label = None if column is None else canonical_label(row.values.get(column))
        return {**self._reader.encode(row), "label": self._indices.get(label or "")}

    def collate(self, features: Sequence[Features]) -> Batch:
        """Put rows together: what the reader makes of them, and `labels`, each may be None."""
        return {
            "ids": [row["id"] for row in features],
            "labels": [row["label"] for row in features],
            **self._reader.collate(features),
        }

    def forward(self, model: Callable[..., Any], batch: Batch) -> StepOutput:
        """Return the loss, the number of pairs, and what is there of three outputs.

        These are `images` and `texts`, unit vectors (B, D), and `labels`, logits (B, C).
        """
        found = model(**self._reader.inputs(batch, model))
        count = len(batch["tokens"])
        logits_BT = found.logits_per_image.float()
        outputs = {"images": found.image_embeds.float()}
        if count:
            outputs["texts"] = found.text_embeds[:count].float()
        if logits_BT.shape[1] > count:
            outputs["labels"] = logits_BT[:, count:]
        loss_sum = pair_loss(logits_BT[:, :count], is_sigmoid=self._is_sigmoid)
        return StepOutput(loss_sum, count, outputs)

    def decode(self, outputs: Mapping[str, torch.Tensor], batch: Batch) -> list[PairPrediction]:
        """Keep the vectors, and turn logits of labels into probabilities."""
        images_BD = outputs["images"].detach().cpu().numpy()
        count = len(images_BD)
        captions, texts, scores = batch["captions"] or [None] * count, [None] * count, [()] * count
        if "texts" in outputs:
            texts = list(outputs["texts"].detach().cpu().numpy())
        if "labels" in outputs:
            logits_BC = outputs["labels"].cpu().double()
            chances_BC = logits_BC.sigmoid() if self._is_sigmoid else logits_BC.softmax(dim=-1)
            scores = [tuple(row) for row in chances_BC.tolist()]
        return [
            PairPrediction(
                id=row_id,
                image=batch["images"][row],
                image_vector=images_BD[row],
                caption=captions[row],
                text_vector=texts[row],
                scores=scores[row],
                reference=batch["labels"][row],
            )
            for row, row_id in enumerate(batch["ids"])
        ]

    def metrics(self, predictions: Sequence[PairPrediction]) -> dict[str, float]:
        """Return recalls where there are captions, `zero_shot_accuracy` where there are labels."""
        from lora_cli.metrics.retrieval import retrieval_metrics

        found = {}
        pairs = [row for row in predictions if row.caption is not None]
        if pairs:
            found = retrieval_metrics(
                np.stack([row.image_vector for row in pairs]),
                np.stack([vector for row in pairs if (vector := row.text_vector) is not None]),
                images=[row.image for row in pairs],
                texts=[str(row.caption) for row in pairs],
            )
        known = [row for row in predictions if row.scores and row.reference is not None]
        if known:
            right = sum(row.label == row.reference for row in known)
            found["zero_shot_accuracy"] = right / len(known)
        return found

    def report(self, predictions: Sequence[PairPrediction]) -> dict[str, Any]:
        """Return nothing: the metrics say it all."""
        del predictions
        return {}

    def to_json(self, prediction: PairPrediction) -> dict[str, Any]:
        """Return id, caption and its `similarity` (a cosine); label and probabilities if any."""
        line: dict[str, Any] = {"id": prediction.id}
        if prediction.text_vector is not None:
            line["caption"] = prediction.caption
            line["similarity"] = float(
                prediction.image_vector.astype(np.float64) @ prediction.text_vector
            )
        if prediction.scores:
            line["label"] = self._labels[prediction.label]
            line["probabilities"] = dict(zip(self._labels, prediction.scores, strict=True))
        if prediction.scores and prediction.reference is not None:
            line["reference"] = self._labels[prediction.reference]
        return line


def pair_loss(logits_BB: torch.Tensor, *, is_sigmoid: bool) -> torch.Tensor:
    """Return the loss of a batch, summed over its pairs; see above.

    Args:
        logits_BB: Of each image with each caption; those of one row belong together.
        is_sigmoid: Whether pairs are told one by one, as SigLIP does.
    """
    if not logits_BB.shape[1]:
        return logits_BB.new_zeros(())
    if is_sigmoid:
        signs_BB = 2 * torch.eye(len(logits_BB), device=logits_BB.device) - 1
        return -functional.logsigmoid(signs_BB * logits_BB).sum()
    own = torch.arange(len(logits_BB), device=logits_BB.device)
    sides = (logits_BB, logits_BB.T)
    losses = [functional.cross_entropy(side, own, reduction="sum") for side in sides]
    return (losses[0] + losses[1]) / 2


class ImageTextContrastive(ImageFamily):
    """A row in the table of families; the state holds nothing but the columns."""

    auto_class = "AutoModelForZeroShotImageClassification"
    task_type: str | None = None
    processor = "image and text processor"
    inputs = (IMAGE,)
    targets = (CAPTION, LABEL)

    def suit(
        self, data: DataConfig, loaded: Loaded, *, state: Mapping[str, Any] | None = None
    ) -> tuple[DataConfig, Loaded]:
        """Make a row of each caption where an image has a list of them."""
        data, loaded = super().suit(data, loaded, state=state)
        return data, by_caption(data, loaded)

    def check_rows(self, rows: Sequence[Row], columns: Columns) -> list[Problem]:
        """Refuse rows without an image, empty captions, and labels that are none."""
        problems = self.input_problems(rows, columns)
        for role, check in (("caption", check_texts), ("label", check_labels)):
            column = columns[role]
            problems += [] if column is None else check(rows, column)
        return problems

    def learn(
        self, config: Any, train: Sequence[Row], loaded: Loaded, columns: Columns
    ) -> dict[str, Any]:
        """Return nothing; refuse to train without captions."""
        del config, loaded
        if columns["caption"] is None:
            key = "task.data.caption_column"
            resolve_column(list_columns(train), None, known=CAPTION.known, key=key)
        return {}

    def check_evaluated(self, config: Any, rows: Sequence[Row], columns: Columns) -> list[Problem]:
        """Refuse labels that are none of zero-shot classification."""
        labels, column = config.zero_shot.labels, columns["label"]
        if labels is None or column is None:
            return []
        known = label_indices(labels, numbered=True)
        found = ((row, canonical_label(row.values.get(column))) for row in rows)
        unknown = [(row, f'"{label}"') for row, label in found if label and label not in known]
        return [_unknown_labels(unknown, column, labels)] if unknown else []

    def groups(self, columns: Columns) -> Groups:
        """Return the rows of one image as a group, so that no split is cut through it."""
        column = columns["image"] or ""
        return Groups(
            group_of=lambda row: image_key(row.values[column]),
            is_usable=lambda _: True,
            what="images",
        )

    def notes(self, train: Sequence[Row], state: Mapping[str, Any]) -> tuple[str, ...]:
        """Say how many captions and images of train are there several times."""
        columns = state["columns"]
        counted = {
            "the caption": [row.values[columns["caption"]] for row in train],
            "the image": [image_key(row.values[columns["image"]]) for row in train],
        }
        return tuple(
            f"train: {count:,} of {len(train):,} rows have {what} of another row; where both are "
            "in one batch, each counts as wrong for the other"
            for what, values in counted.items()
            if (count := sum(n for n in Counter(values).values() if n > 1))
        )

    def describe(self, state: Mapping[str, Any]) -> str:
        """Return nothing: nothing was learned."""
        del state
        return ""

    def model_options(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Return nothing: there is no head."""
        del state
        return {}

    def fit_model(self, model: nn.Module, state: Mapping[str, Any]) -> None:
        """Refuse a model that is no dual encoder."""
        del state
        config: Any = model.config
        if config.model_type not in MODELS:
            raise UserError(_no_dual_encoder(config.model_type))

    def bind_columns(
        self, columns: Sequence[str], state: Mapping[str, Any], *, where: str
    ) -> Mapping[str, Any]:
        """Find the image, and the caption if there is one."""
        bound = super().bind_columns(columns, state, where=where)
        usual = (state["columns"]["caption"], *CAPTION.known)
        caption = next((name for name in usual if name in columns), None)
        return {**bound, "columns": {**bound["columns"], "caption": caption}}

    def check_row(self, row: Row, state: Mapping[str, Any]) -> None:
        """Refuse a row whose image or caption cannot be read."""
        raise_if(self.check_rows((row,), {**state["columns"], "label": None}))

    def build(
        self, config: ImageTextContrastiveConfig, state: Mapping[str, Any], processor: Any
    ) -> ImageTextContrastiveTask:
        """Bind the family; `processor` has an image processor and a tokenizer."""
        if config.zero_shot.labels is None:
            raise_if(without_purpose(state["columns"]))
        return ImageTextContrastiveTask(config, state, processor)


def _unknown_labels(rows: Sequence[tuple[Row, str]], column: str, labels: Sequence[str]) -> Problem:
    return Problem(
        id="data.unknown-label",
        message=f"`{column}` must be one of `zero_shot.labels` in every row that is evaluated, but "
        f"is not in {len(rows):,}.",
        where=list_rows(rows),
        allowed=", ".join(labels),
        fix="name all labels in zero_shot.labels, or remove the rows",
    )


def _no_dual_encoder(kind: str) -> Problem:
    return Problem(
        id="model.no-dual-encoder",
        message="`model.path` must name a dual encoder of images and texts, but this "
        f"{kind} is none.",
        key="model.path",
        allowed=", ".join(MODELS),
        fix="model=clip-base, model=siglip-base",
    )

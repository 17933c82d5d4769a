"""What the families share whose rows have a sound and what is said in it."""

from collections.abc import Mapping, Sequence
from typing import Any

from lora_cli import packages
from lora_cli.config.tasks import DataConfig
from lora_cli.data import made_up
from lora_cli.data.columns import check_texts
from lora_cli.data.listing import list_rows
from lora_cli.data.sources import Loaded
from lora_cli.data.transcripts import normalize
from lora_cli.data.types import Row
from lora_cli.errors import Problem, UserError
from lora_cli.tasks.audio import AudioFamily
from lora_cli.tasks.contract import Features
from lora_cli.tasks.rows import Columns, Role

TRANSCRIPT = Role(
    "text",
    (
        *("text", "sentence", "transcription", "transcript", "normalized_text"),
        *("raw_transcription", "transcriptions", "words"),
    ),
    made_up=made_up.word,
)


class SpokenFamily(AudioFamily):
    """Rows with a sound and its transcript; sounds are never cut."""

    task_type: str | None = None
    targets = (TRANSCRIPT,)

    def find(self, data: DataConfig, *, file_split: str = "train") -> Loaded:
        """Read the rows; refuse to start where what counts errors is not installed."""
        packages.check_extra("jiwer", extra="audio", needed_by="Speech recognition")
        return super().find(data, file_split=file_split)

    def check_rows(self, rows: Sequence[Row], columns: Columns) -> list[Problem]:
        """Refuse rows without a sound, or whose transcript is empty."""
        problems, column = self.input_problems(rows, columns), columns["text"]
        return problems if column is None else problems + check_texts(rows, column)

    def check_evaluated(self, config: Any, rows: Sequence[Row], columns: Columns) -> list[Problem]:
        """Refuse transcripts of which nothing is left."""
        column = columns["text"] or ""
        empty = [row for row in rows if not normalize(row.values[column], config.normalizer)]
        return [_nothing_left(empty, column)] if empty else []

    def learn_used(
        self, config: Any, train: Sequence[Row], state: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return nothing more: sounds are not cut."""
        del config, train, state
        return {}


def without_long(
    features: Sequence[Features], kept: Sequence[Features], *, limit: str, key: str, fix: str
) -> tuple[Sequence[Features], tuple[str, ...]]:
    """Return the rows that can be trained on, with a sentence if they are not all.

    Args:
        features: Encoded rows.
        kept: Those that can be trained on.
        limit: What the others are longer than.
        key: The setting that says so.
        fix: What to do if none can be.

    Raises:
        UserError: If none is left.
    """
    if not kept:
        raise UserError(
            Problem(
                id="data.all-long",
                message="`train` must have rows that are short enough to be trained on, but all "
                f"are longer than {limit}.",
                key=key,
                fix=fix,
            )
        )
    if len(kept) == len(features):
        return features, ()
    left_out = len(features) - len(kept)
    return kept, (f"left out {left_out:,} of {len(features):,} rows, longer than {limit}",)


def _nothing_left(rows: Sequence[Row], column: str) -> Problem:
    return Problem(
        id="data.empty-transcript",
        message=f"`{column}` must hold words in every row, but nothing is left of "
        f"{len(rows):,} transcripts without punctuation.",
        where=list_rows(rows),
        fix="correct these rows, or task.normalizer=none",
    )

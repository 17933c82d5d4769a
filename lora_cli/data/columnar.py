"""Parquet and Arrow files, read batch by batch without writing to a cache."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lora_cli.data.parsers import BadRowError, Numbered

_RULE = {"parquet": "must be a Parquet file", "arrow": "must be an Arrow file or stream"}


def iter_batches(
    path: Path, layout: str, *, rows: int = 1024, columns: Sequence[str] | None = None
) -> Iterator[Any]:
    """Yield record batches.

    Args:
        path: The file.
        layout: "parquet" or "arrow".
        rows: Of a batch of a Parquet file, at most.
        columns: What to read; None reads all.
    """
    if layout == "parquet":
        import pyarrow.parquet as pq

        with pq.ParquetFile(path) as file:
            yield from file.iter_batches(batch_size=rows, columns=columns)
        return
    for batch in _iter_arrow(path):
        yield batch if columns is None else batch.select(list(columns))


def _iter_arrow(path: Path) -> Iterator[Any]:
    import pyarrow as pa

    with path.open("rb") as stream:
        is_file = stream.read(6) == b"ARROW1"
    with pa.OSFile(str(path), "rb") as source:
        if is_file:
            reader = pa.ipc.open_file(source)
            yield from (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:
            yield from pa.ipc.open_stream(source)


def iter_columnar(path: Path, layout: str) -> Iterator[Numbered]:
    """Yield the numbered rows of a file whose layout is "parquet" or "arrow".

    Raises:
        BadRowError: If the bytes are not of that layout, or two columns have one name.
    """
    number = 0
    with reading(layout):
        for batch in iter_batches(path, layout):
            check_names(batch.schema.names, layout)
            for values in batch.to_pylist():
                number += 1
                yield number, values


def check_names(names: Sequence[str], layout: str) -> None:
    """Raise BadRowError if two columns have one name."""
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        fix = "give each column one name of its own"
        finding = f'has two columns called "{twice}"'
        raise BadRowError(None, rule=_RULE[layout], finding=finding, fix=fix)


@contextmanager
def reading(layout: str) -> Iterator[None]:
    """Turn what pyarrow says of a damaged file of a layout into BadRowError."""
    import pyarrow as pa

    try:
        yield
    # pyarrow reports damaged files as ArrowInvalid, OSError or, for texts, UnicodeDecodeError.
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0][:120].rstrip(".")
        raise BadRowError(
            None,
            rule=_RULE[layout],
            finding=f"cannot be read as one ({reason})",
            fix="write or download the file again",
        ) from None


def load_class_names(path: Path, layout: str) -> dict[str, tuple[str, ...]]:
    """Return the label names that the datasets library stored beside the rows, by column."""
    import pyarrow as pa

    if layout == "parquet":
        import pyarrow.parquet as pq

        with pq.ParquetFile(path) as file:
            metadata = file.schema_arrow.metadata or {}
    else:
        with path.open("rb") as stream:
            is_file = stream.read(6) == b"ARROW1"
        with pa.OSFile(str(path), "rb") as source:
            reader = pa.ipc.open_file(source) if is_file else pa.ipc.open_stream(source)
            metadata = reader.schema.metadata or {}
    try:
        features = json.loads(metadata.get(b"huggingface", b"{}"))["info"]["features"]
        # A column of lists says of its items what another column says of its values.
        items = {
            column: feature.get("feature", feature)
            for column, feature in features.items()
            if isinstance(feature, dict)
        }
        return {
            column: tuple(str(name) for name in item["names"])
            for column, item in items.items()
            if item.get("_type") == "ClassLabel"
        }
    # The note is optional and written by strangers: without it, labels are named by their values.
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}

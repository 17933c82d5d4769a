"""Bytes in columns of Parquet and Arrow files, which are left there until they are asked for.

A Parquet file can only be read a thousand rows at a time. So its columns of bytes are copied once
into an Arrow file in the cache, of which any row can be read without the others. What the hub's
library has downloaded is such a file already.
"""

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

from lora_cli.data.cache import cache_folder
from lora_cli.data.columnar import check_names, iter_batches, reading
from lora_cli.data.parsers import Numbered

# Rows of images may be large.
_ROWS = 128


def iter_with_cells(path: Path, layout: str) -> Iterator[Numbered]:
    """Yield the numbered rows of a file, with the place of a cell for each of its bytes.

    Raises:
        BadRowError: If it cannot be read.
        OSError: If the cache cannot be written.
    """
    facts = path.stat()
    number = 0
    with reading(layout):
        schema = next((batch.schema for batch in iter_batches(path, layout, rows=1)), ())
        check_names([field.name for field in schema], layout)
        names = byte_columns(schema)
        others = [field.name for field in schema if field.name not in names]
        key = f"{path.absolute()}\n{facts.st_size}\n{facts.st_mtime_ns}\n{names}"
        table = store(key, iter_batches(path, layout, rows=_ROWS, columns=names)) if names else ""
        for batch in iter_batches(path, layout, columns=others or names):
            for values in batch.to_pylist():
                cells = {name: cell(str(table), name, number, facts.st_mtime_ns) for name in names}
                number += 1
                yield number, {**values, **cells}


def table_cells(table: Any, columns: Sequence[str]) -> list[dict[str, Any]]:
    """Return the cells of some columns of a data set of the datasets library, by row."""
    if not columns:
        return []
    files = [entry["filename"] for entry in table.cache_files]
    if sum(len(_column(file, columns[0])) for file in files) != len(table):
        batches = table.data.table.select(list(columns)).to_batches(max_chunksize=_ROWS)
        files = [str(store(f"{table._fingerprint}\n{columns}", iter(batches)))]
    found = []
    for file in files:
        modified = Path(file).stat().st_mtime_ns
        found += [
            {name: cell(file, name, row, modified) for name in columns}
            for row in range(len(_column(file, columns[0])))
        ]
    return found


def cell(table: str, column: str, row: int, modified: int) -> Any:
    """Return the place of a cell, or those of what is in its list; see `lora_cli.data.media`."""
    place = {"path": None, "table": table, "column": column, "row": row, "modified": modified}
    values = _column(table, column)
    if not _is_list(values.type):
        return place
    value = values[row]
    return [{**place, "item": item} for item in range(len(value) if value.is_valid else 0)]


def _is_list(kind: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind))


def byte_columns(schema: Any) -> tuple[str, ...]:
    """Return the columns of bytes, of objects with them as the datasets library has, or of lists.

    The lists are of bytes or of such objects.
    """
    import pyarrow as pa

    def has_bytes(kind: Any) -> bool:
        if _is_list(kind):
            return has_bytes(kind.value_type)
        if pa.types.is_struct(kind):
            place = kind.get_field_index("bytes")
            return place >= 0 and has_bytes(kind.field(place).type)
        return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))

    return tuple(field.name for field in schema if has_bytes(field.type))


def read_cell(table: str, column: str, row: int, item: int | None = None) -> bytes | None:
    """Return the bytes of a cell, which may also be an object with bytes or the path of a file.

    Args:
        table: The Arrow file.
        column: Its column.
        row: Its row.
        item: Which of a list; None where the cell holds no list.
    """
    scalar = _column(table, column)[row]
    value: Any = (scalar if item is None else scalar[item]).as_py()
    if isinstance(value, Mapping):
        if value.get("bytes") is None and value.get("path"):
            path = Path(value["path"])
            return path.read_bytes() if path.is_file() else None
        value = value.get("bytes")
    return None if value is None else bytes(value)


@lru_cache(maxsize=64)
def _column(table: str, column: str) -> Any:
    """Map a column of an Arrow file; memory holds what is looked at."""
    import pyarrow as pa

    source = pa.memory_map(table)
    is_file = source.read(6) == b"ARROW1"
    source.seek(0)
    reader = pa.ipc.open_file(source) if is_file else pa.ipc.open_stream(source)
    return reader.read_all().column(column)


def store(key: str, batches: Iterator[Any]) -> Path:
    """Return an Arrow file with some record batches, which is made if it is not there.

    Args:
        key: What tells these batches from others.
        batches: Read where the file is not there.

    Raises:
        OSError: If it cannot be written.
    """
    import pyarrow as pa

    target = cache_folder() / "media" / f"{hashlib.sha256(key.encode()).hexdigest()}.arrow"
    if target.is_file():
        return target
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    staged = target.with_suffix(f".tmp-{os.getpid()}")
    try:
        with pa.OSFile(str(staged), "wb") as sink:
            first = next(batches)
            with pa.ipc.new_file(sink, first.schema) as writer:
                for batch in chain([first], batches):
                    writer.write_batch(batch)
        staged.replace(target)
    finally:
        staged.unlink(missing_ok=True)
    return target

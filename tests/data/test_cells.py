"""Bytes that stay in columns of files, and pyarrow and the datasets library on the same files."""

from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lora_cli.data.cells import byte_columns, read_cell, table_cells
from lora_cli.data.files import read_file
from lora_cli.errors import UserError

VALUES = [{"bytes": bytes([n % 256]) * (n + 1), "path": f"{n}.png"} for n in range(300)]


def read(cell: Any) -> bytes | None:
    return read_cell(cell["table"], cell["column"], cell["row"])


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORA_CLI_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "media"


def write(path: Path, values: list[Any]) -> Path:
    table = pa.table({"image": values, "label": [n % 3 for n in range(len(values))]})
    if path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=50)
    else:
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=70)
    return path


@pytest.mark.parametrize("layout", ["parquet", "arrow"])
@pytest.mark.parametrize("is_plain", [False, True])
def test_rows_hold_places_of_their_bytes(
    tmp_path: Path, cache: Path, layout: str, is_plain: bool
) -> None:
    values = [value["bytes"] for value in VALUES] if is_plain else VALUES
    path = write(tmp_path / f"rows.{layout}", values)
    rows = read_file(path, keep_bytes=False)
    assert len(rows) == 300
    for number in (0, 69, 70, 128, 299):
        assert rows[number].values["label"] == number % 3
        assert read(rows[number].values["image"]) == VALUES[number]["bytes"]
    assert not any(isinstance(part, bytes) for part in rows[0].values["image"].values())
    assert len(list(cache.iterdir())) == 1
    assert read_file(path, keep_bytes=False) == rows
    assert read_file(path)[7].values["image"] == values[7]


def test_another_file_of_that_name_is_read_anew(tmp_path: Path, cache: Path) -> None:
    path = write(tmp_path / "rows.parquet", VALUES)
    read_file(path, keep_bytes=False)
    write(path, [*VALUES[:5], {"bytes": b"new", "path": None}])
    assert read(read_file(path, keep_bytes=False)[-1].values["image"]) == b"new"
    assert len(list(cache.iterdir())) == 2


def test_columns_with_bytes() -> None:
    schema = pa.schema(
        {
            "a": pa.binary(),
            "b": pa.struct({"bytes": pa.large_binary(), "path": pa.string()}),
            "c": pa.struct({"text": pa.string()}),
            "d": pa.string(),
        }
    )
    assert byte_columns(schema) == ("a", "b")


def test_a_cell_with_a_path_alone(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"there")
    whole, path_alone = VALUES[1], {"bytes": None, "path": str(tmp_path / "a.png")}
    path = write(tmp_path / "r.parquet", [path_alone, None, whole])
    rows = read_file(path, keep_bytes=False)
    assert read(rows[0].values["image"]) == b"there"
    assert read(rows[1].values["image"]) is None


def test_a_damaged_file_leaves_nothing_in_the_cache(tmp_path: Path, cache: Path) -> None:
    path = write(tmp_path / "rows.parquet", VALUES)
    content = path.read_bytes()
    path.write_bytes(content[:200] + bytes(400) + content[600:])
    with pytest.raises(UserError):
        read_file(path, keep_bytes=False)
    assert not cache.exists() or not list(cache.iterdir())


@pytest.mark.parametrize("in_memory", [False, True])
def test_cells_of_a_data_set_of_the_hub(tmp_path: Path, cache: Path, in_memory: bool) -> None:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int32")})
    data = {"image": VALUES, "label": list(range(300))}
    table = datasets.Dataset.from_dict(data, features=features)
    if not in_memory:
        table.save_to_disk(str(tmp_path / "saved"), num_shards=2)
        table = datasets.load_from_disk(str(tmp_path / "saved"))
    cells = table_cells(table, ["image"])
    assert [read(cell["image"]) for cell in cells] == [value["bytes"] for value in VALUES]
    assert cache.exists() is in_memory


def items(cells: list[Any]) -> list[bytes | None]:
    return [read_cell(cell["table"], cell["column"], cell["row"], cell["item"]) for cell in cells]


@pytest.mark.parametrize("layout", ["parquet", "arrow"])
def test_lists_of_bytes_become_lists_of_places(tmp_path: Path, cache: Path, layout: str) -> None:
    lists = [VALUES[n : n + n % 4] for n in range(40)]
    path = write(tmp_path / f"rows.{layout}", [*lists, None])
    rows = read_file(path, keep_bytes=False)
    assert [items(row.values["image"]) for row in rows] == [
        *([value["bytes"] for value in own] for own in lists),
        [],
    ]
    assert cache.exists()


def test_lists_of_images_of_the_hub(tmp_path: Path, cache: Path) -> None:
    lists = [VALUES[n : n + n % 4] for n in range(40)]
    features = datasets.Features({"images": datasets.List(datasets.Image())})
    table = datasets.Dataset.from_dict({"images": lists}, features=features)
    found = [items(cell["images"]) for cell in table_cells(table, ["images"])]
    assert found == [[value["bytes"] for value in own] for own in lists]

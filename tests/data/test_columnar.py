import datasets
import pytest

from lora_cli.data.columnar import iter_columnar, load_class_names
from lora_cli.data.parsers import BadRowError


@pytest.fixture
def table():
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])}
    )
    return datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features)


def test_rows_and_label_names_of_a_parquet_file_written_by_datasets(tmp_path, table):
    path = tmp_path / "a.parquet"
    table.to_parquet(path)
    assert list(iter_columnar(path, "parquet")) == [
        (1, {"text": "a", "label": 1}),
        (2, {"text": "b", "label": 0}),
    ]
    assert load_class_names(path, "parquet") == {"label": ("no", "yes")}


def test_rows_and_label_names_of_an_arrow_file_written_by_datasets(tmp_path, table):
    table.save_to_disk(tmp_path / "saved")
    path = next((tmp_path / "saved").glob("*.arrow"))
    assert [values["text"] for _, values in iter_columnar(path, "arrow")] == ["a", "b"]
    assert load_class_names(path, "arrow") == {"label": ("no", "yes")}


def test_strange_metadata_is_ignored(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    plain = pa.table({"a": [1]})
    for note in (b"{", b"[]", b'{"info": 3}', b'{"info": {"features": {"a": {"_type": 1}}}}'):
        pq.write_table(
            plain.replace_schema_metadata({b"huggingface": note}), tmp_path / "a.parquet"
        )
        assert load_class_names(tmp_path / "a.parquet", "parquet") == {}


def test_two_columns_of_one_name_are_refused(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(
        pa.table([pa.array([1]), pa.array([2])], names=["a", "a"]), tmp_path / "a.parquet"
    )
    with pytest.raises(BadRowError, match=r'two columns called "a"|cannot be read'):
        list(iter_columnar(tmp_path / "a.parquet", "parquet"))

import json
import sys

import pytest

from lora_cli.config.tasks import DataConfig
from lora_cli.data.files import ALL_LAYOUTS
from lora_cli.data.sources import load_rows
from lora_cli.errors import UserError


def write(path, *texts):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".csv":
        path.write_text("text\n" + "".join(f"{text}\n" for text in texts))
    elif path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table({"text": list(texts)}), path)
    else:
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def texts_of(path):
    loaded = load_rows(DataConfig(path=str(path)))
    return {name: [row.values["text"] for row in rows] for name, rows in loaded.rows.items()}


def problem_of(path):
    with pytest.raises(UserError) as caught:
        load_rows(DataConfig(path=str(path) if path is not None else None))
    return caught.value.problems[0]


def test_a_file_is_train(tmp_path):
    assert texts_of(write(tmp_path / "data(1) it's=ü.csv", "a", "b")) == {"train": ["a", "b"]}


def test_a_folder_of_splits(tmp_path):
    for name in ("train.jsonl", "dev.csv", "test.jsonl", "validation_ood.jsonl"):
        write(tmp_path / name, name)
    for name in ("README.md", ".hidden.jsonl", "LICENSE", "notes.txt", "dataset_infos.json"):
        (tmp_path / name).write_text("not rows")
    (tmp_path / "images").mkdir()
    assert texts_of(tmp_path) == {
        "train": ["train.jsonl"],
        "validation": ["dev.csv"],
        "test": ["test.jsonl"],
        "validation_ood": ["validation_ood.jsonl"],
    }
    assert list(texts_of(tmp_path))[:3] == ["train", "validation", "test"]


def test_shards_are_joined_in_order(tmp_path):
    write(tmp_path / "train-00001-of-00002.parquet", "c", "d")
    write(tmp_path / "train-00000-of-00002.parquet", "a", "b")
    write(tmp_path / "test-00000-of-00001.parquet", "e")
    assert texts_of(tmp_path) == {"train": ["a", "b", "c", "d"], "test": ["e"]}
    rows = load_rows(DataConfig(path=str(tmp_path))).rows["train"]
    assert [row.id for row in rows] == ["1", "2", "3", "4"]
    assert rows[2].where.endswith("train-00001-of-00002.parquet row 1")
    (tmp_path / "train-00000-of-00002.parquet").unlink()
    assert problem_of(tmp_path).id == "data.missing-shard"


def test_ids_of_shards_stay_those_of_the_file_if_unique_over_all(tmp_path):
    for shard, ids in (("00000", ["x", "y"]), ("00001", ["z", "x"])):
        lines = "".join(json.dumps({"id": i, "text": i}) + "\n" for i in ids)
        (tmp_path / f"train-{shard}-of-00002.jsonl").write_text(lines)
    rows = load_rows(DataConfig(path=str(tmp_path))).rows["train"]
    assert [row.id for row in rows] == ["1", "2", "3", "4"]
    (tmp_path / "train-00001-of-00002.jsonl").write_text('{"id": "z", "text": "z"}\n')
    rows = load_rows(DataConfig(path=str(tmp_path))).rows["train"]
    assert [row.id for row in rows] == ["x", "y", "z"]


@pytest.mark.parametrize(
    "names",
    [
        ("train.jsonl", "train.csv"),
        ("val.jsonl", "dev.jsonl"),
        ("train.jsonl", "train-00000-of-00001.jsonl"),
        ("train-00000-of-00002.jsonl", "train-00001-of-00003.jsonl"),
    ],
)
def test_two_files_for_one_split_are_refused(tmp_path, names):
    for name in names:
        write(tmp_path / name, "a")
    problem = problem_of(tmp_path)
    assert problem.id == "data.two-files"
    assert all(name in problem.message for name in names)


def test_folders_without_data_and_splits_in_other_formats_are_refused(tmp_path):
    assert problem_of(tmp_path).id == "data.no-files"
    (tmp_path / "cat.png").write_bytes(b"x")
    problem = problem_of(tmp_path)
    assert "1 image files" in problem.message
    assert problem.fix == "a task that reads such files: task=image_classification"
    (tmp_path / "train.zip").write_text("x")
    assert problem_of(tmp_path).id == "data.unknown-format"


@pytest.mark.parametrize(
    "path", ["./none", "../none", "~/none", "/none/at/all", "none.csv", "none.py", "a/b/c", "a b"]
)
def test_what_looks_like_a_path_is_never_looked_up(path, monkeypatch):
    monkeypatch.setattr("lora_cli.data.sources.load_hub_rows", lambda *_, **__: pytest.fail(path))
    problem = problem_of(path)
    assert problem.id == "data.no-such-file"
    assert "no such file" in problem.message


def test_a_source_is_needed():
    assert problem_of(None).id == problem_of("").id == "data.no-source"


def test_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_CLI_CACHE", str(tmp_path / "own"))
    write(tmp_path / "own" / "mine" / "train.jsonl", "a")
    assert texts_of("cache://mine") == {"train": ["a"]}
    problem = problem_of("cache://movie-reviews")
    assert problem.id == "data.not-in-cache"
    assert problem.fix == "python -m lora_cli.data.movie_reviews"
    for name in ("cache://../secret", "cache://", "cache:///etc", "cache://a/b"):
        assert problem_of(name).id == "data.bad-cache-name"


def test_files_in_packages(tmp_path, monkeypatch):
    write(tmp_path / "canary_rows" / "data" / "train.jsonl", "a")
    (tmp_path / "canary_rows" / "__init__.py").write_text("raise RuntimeError")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert texts_of("pkg://canary_rows/data") == {"train": ["a"]}
    assert texts_of("pkg://canary_rows/data/train.jsonl") == {"train": ["a"]}
    assert "canary_rows" not in sys.modules


def test_label_names_of_parquet_files_are_found(tmp_path):
    import datasets

    features = datasets.Features({"label": datasets.ClassLabel(names=["no", "yes"])})
    table = datasets.Dataset.from_dict({"label": [1, 0]}, features=features)
    table.to_parquet(tmp_path / "train.parquet")
    assert load_rows(DataConfig(path=str(tmp_path))).class_names == {"label": ("no", "yes")}


def test_plain_texts_are_read_where_they_are_asked_for(tmp_path):
    (tmp_path / "train.txt").write_text("one\n\ntwo\n")
    (tmp_path / "test.txt").write_text("three\n")
    assert problem_of(tmp_path).id == "data.unknown-format"
    assert problem_of(tmp_path / "train.txt").id == "data.unknown-format"
    loaded = load_rows(DataConfig(path=str(tmp_path)), layouts=ALL_LAYOUTS)
    found = {name: [row.values for row in rows] for name, rows in loaded.rows.items()}
    assert found == {"train": [{"text": "one"}, {"text": "two"}], "test": [{"text": "three"}]}
    config = DataConfig(path=str(tmp_path / "train.txt"))
    assert len(load_rows(config, layouts=ALL_LAYOUTS).rows["train"]) == 2

import time

import datasets
import pytest

from lora_cli.config.tasks import DataConfig
from lora_cli.data.media import read_place
from lora_cli.data.sources import load_rows
from lora_cli.errors import UserError


def test_an_unreachable_hub_is_said_soon(monkeypatch):
    start = time.monotonic()
    with pytest.raises(UserError) as caught:
        load_rows(DataConfig(path="nobody/no-such-set", name="a"))
    problem = caught.value.problems[0]
    assert problem.id == "data.hub-unreachable"
    assert "the hub cannot be reached" in problem.message
    assert "task.data.path=FILE" in problem.fix
    assert "task=movie_reviews" in problem.fix
    assert time.monotonic() - start < 5


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the library's loader, which records what it was asked."""
    asked = {}

    def split(labels):
        features = datasets.Features(
            {
                "sentence": datasets.Value("string"),
                "label": datasets.ClassLabel(names=["no", "yes"]),
            }
        )
        data = {"sentence": [f"s{n}" for n, _ in enumerate(labels)], "label": labels}
        return datasets.Dataset.from_dict(data, features=features)

    def load_dataset(path, name=None, **options):
        asked.update(path=path, name=name, **options)
        if name == "missing":
            raise ValueError("Config name is missing.\nPlease pick one of ['a', 'b']")
        return datasets.DatasetDict(train=split([0, 1, 1]), test=split([-1, -1]))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


def test_rows_label_names_and_unlabelled_splits(hub):
    loaded = load_rows(DataConfig(path="some/set", name="sst2", revision="main"))
    assert hub == {"path": "some/set", "name": "sst2", "revision": "main"}
    assert [dict(row.values) for row in loaded.rows["train"]] == [
        {"sentence": "s0", "label": 0},
        {"sentence": "s1", "label": 1},
        {"sentence": "s2", "label": 1},
    ]
    assert loaded.rows["train"][1].where == "some/set:train row 2"
    assert loaded.class_names == {"label": ("no", "yes")}
    assert list(loaded.rows) == ["train"]
    assert loaded.notes == ("test: left out, label is -1 in all of its 2 rows.",)


def test_other_configurations_are_named(hub):
    with pytest.raises(UserError) as caught:
        load_rows(DataConfig(path="some/set", name="missing"))
    assert caught.value.problems[0].key == "task.data.name"


def test_the_offline_switch_is_put_back(hub, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    load_rows(DataConfig(path="some/set"))
    assert datasets.config.HF_HUB_OFFLINE is False


def test_lists_of_images_are_places(monkeypatch, tmp_path):
    monkeypatch.setenv("LORA_CLI_CACHE", str(tmp_path))
    images = [[], [{"bytes": b"1", "path": None}], [{"bytes": b"2", "path": "2.png"}] * 2]
    features = datasets.Features(
        {"images": datasets.List(datasets.Image()), "text": datasets.Value("string")}
    )
    table = datasets.Dataset.from_dict({"images": images, "text": list("abc")}, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: {"train": table})
    rows = load_rows(DataConfig(path="some/set")).rows["train"]
    assert [row.values["text"] for row in rows] == list("abc")
    found = [[read_place(place) for place in row.values["images"]] for row in rows]
    assert found == [[], [b"1"], [b"2", b"2"]]

